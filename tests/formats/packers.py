"""GPTQ's and AWQ's layouts, number by number, from what AutoGPTQ and AutoAWQ publish of them. Both packages' own
readers were found to agree with these (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _word(numbers: list[int], bits: int) -> int:
    """As an int32, the first number lowest."""
    word = sum(number << bits * place for place, number in enumerate(numbers))
    return word - (1 << 32) if word >= 1 << 31 else word


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, less: int = 1) -> dict[str, Tensor]:
    """`codes` [R, C], `zeros` and `scales` [R, G]: words along the columns, everything transposed, zeros less one."""
    each, (rows, columns) = 32 // bits, codes.shape
    weight = torch.tensor(
        [[_word([int(codes[row, word * each + place]) for place in range(each)], bits) for row in range(rows)]
         for word in range(columns // each)], dtype=torch.int32,
    )  # fmt: skip
    mask = (1 << bits) - 1
    packed = torch.tensor(
        [[_word([int(zeros[word * each + place, group]) - less & mask for place in range(each)], bits)
          for word in range(rows // each)] for group in range(zeros.shape[1])], dtype=torch.int32,
    )  # fmt: skip
    group = columns // zeros.shape[1]
    index = torch.tensor([column // group for column in range(columns)], dtype=torch.int32)
    return {".qweight": weight, ".qzeros": packed, ".scales": scales.T.contiguous(), ".g_idx": index}


def awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The same: words of eight rows, of which 0, 2, 4, 6, 1, 3, 5, 7 stand from low to high."""
    order, (rows, columns) = (0, 2, 4, 6, 1, 3, 5, 7), codes.shape

    def packed(numbers: Tensor, count: int) -> Tensor:
        return torch.tensor(
            [[_word([int(numbers[word * 8 + place, at]) for place in order], 4) for word in range(rows // 8)]
             for at in range(count)], dtype=torch.int32,
        )  # fmt: skip

    return {
        ".qweight": packed(codes, columns), ".qzeros": packed(zeros, zeros.shape[1]), ".scales": scales.T.contiguous(),
    }  # fmt: skip
