"""Choosing tokens."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from weft.execute.draws import Slice
from weft.execute.protocol import Choice, Chosen
from weft.execute.sampler import likeliest, sample

WISHES = [
    {}, {"top_k": 3}, {"top_k": 7, "top_p": 0.6}, {"top_p": 0.3}, {"top_p": 0.9, "min_p": 0.02}, {"top_p": 1e-9},
    {"temperature": 2.0, "top_p": 0.999}, {"temperature": 0.3, "top_p": 0.7}, {"top_k": 600, "top_p": 0.5},
]  # fmt: skip
SPLITS = [(1300,), (650, 650), (3, 0, 900, 397)]  # tokens of each rank's slice


class Talked:
    """`sample` on several ranks, one thread each; `sent`: numbers that each told the others."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths, self.sent = widths, 0
        self.barrier, self.heard = threading.Barrier(len(widths), timeout=30), [torch.empty(0)] * len(widths)

    def exchange(self, rank: int, numbers: torch.Tensor) -> list[torch.Tensor]:
        self.heard[rank] = numbers
        self.barrier.wait()
        heard = list(self.heard)
        assert len({len(each) for each in heard}) == 1
        self.sent += len(numbers) if rank == 0 else 0
        self.barrier.wait()
        return heard

    def rank(self, rank: int, logits: torch.Tensor, choices: list[Choice]) -> list[Chosen]:
        first = sum(self.widths[:rank])
        part = Slice(rank, first, self.widths[rank], logits.shape[1])
        mine = logits[:, first : first + self.widths[rank]]
        told = self.exchange(rank, likeliest(mine, first).flatten())
        told = [each.view(-1, 2) for each in told]
        return sample(mine, choices, part, told, partial(self.exchange, rank))

    def sample(self, logits: torch.Tensor, choices: list[Choice]) -> list[Chosen]:
        with ThreadPoolExecutor(len(self.widths)) as pool:
            ranks = [pool.submit(self.rank, rank, logits, choices) for rank in range(len(self.widths))]
            [first, *others] = [each.result(timeout=60) for each in ranks]
        assert all(other == first for other in others), "every rank knows what was chosen"
        return first


LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0])


def draws(choice: dict, count: int = 2000) -> Counter:
    rows = LOGITS.expand(count, -1)
    return Counter(c.token for c in sample(rows, [Choice(**choice, index=i, seed=5) for i in range(count)]))


def test_greedy() -> None:
    assert [c.token for c in sample(torch.stack([LOGITS, -LOGITS]), [Choice(), Choice()])] == [4, 3]


def test_frequencies_follow_the_probabilities() -> None:
    counts, expected = draws({"temperature": 0.7}, 4000), torch.softmax(LOGITS / 0.7, 0)
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] / 4000 - probability) < 0.03


@pytest.mark.parametrize(
    ("limit", "left"),
    [({"top_k": 2}, {4, 0}), ({"top_p": 0.6}, {4}), ({"top_p": 0.8}, {4, 0}), ({"min_p": 0.3}, {4, 0}),
     ({"top_k": 3, "top_p": 0.99}, {4, 0, 1})],
)  # fmt: skip
def test_limits(limit: dict, left: set[int]) -> None:
    assert set(draws({"temperature": 1.0, **limit})) == left


def test_seed_and_index_decide() -> None:
    rows = LOGITS.expand(50, -1)
    first, again, other = (
        [c.token for c in sample(rows, [Choice(temperature=1.0, seed=seed, index=i) for i in range(50)])]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_choice_does_not_depend_on_its_neighbours() -> None:
    choice = Choice(temperature=0.9, seed=3, index=4)
    alone = sample(LOGITS[None], [choice])[0].token
    assert sample(torch.stack([-LOGITS, LOGITS]), [Choice(), choice])[1].token == alone


def test_penalties() -> None:
    assert sample(LOGITS[None], [Choice(repetition=2.0, prompt=[4])])[0].token == 0
    assert sample(LOGITS[None], [Choice(presence=1.5, output=[4])])[0].token == 0
    assert sample(LOGITS[None], [Choice(presence=1.5, prompt=[4])])[0].token == 4  # prompts don't count here
    assert sample(LOGITS[None], [Choice(frequency=0.6, output=[4, 4])])[0].token == 0
    assert sample(LOGITS[None], [Choice(frequency=0.6, output=[4])])[0].token == 4
    assert sample(-LOGITS[None], [Choice(repetition=4.0, prompt=[3, 2])])[0].token == 3
    assert sample(-LOGITS[None], [Choice(repetition=4.0, prompt=[3, 2, 1], output=[3])])[0].token == 3


def test_banned_tokens() -> None:
    assert sample(LOGITS[None], [Choice(banned=[4, 0])])[0].token == 1


def test_logprobs_are_the_models_own() -> None:
    chosen = sample(LOGITS[None], [Choice(temperature=0.5, top_k=1, banned=[4], logprobs=2)])[0]
    logprobs = torch.log_softmax(LOGITS, 0)
    assert chosen.token == 0 and chosen.rank == 2
    assert chosen.logprob == pytest.approx(float(logprobs[0]))
    assert [token for token, _ in chosen.top] == [4, 0]


def test_logits_are_left_alone() -> None:
    logits = LOGITS[None].clone()
    sample(logits, [Choice(repetition=2.0, prompt=[4], banned=[1])])
    assert torch.equal(logits, LOGITS[None])


def test_a_top_p_next_to_nothing_leaves_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.9, -5.0]])
    for seed in range(20):
        [chosen] = sample(logits, [Choice(temperature=1.0, top_p=5e-324, top_k=1, seed=seed)])
        assert chosen.token == 1


def test_a_row_that_cannot_be_chosen_from_says_why_and_concerns_no_other() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 2.0]])
    choices = [Choice(), Choice(), Choice(temperature=1.0), Choice(allowed=b"\0")]
    fine, nan, infinite, forbidden = sample(logits, choices)
    assert fine.token == 1 and not fine.error
    assert "not finite" in nan.error and "not finite" in infinite.error and "no token is allowed" in forbidden.error


def test_given_tokens_are_scored() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    [scored] = sample(logits, [Choice(given=0, logprobs=1)])
    expected = torch.log_softmax(logits[0], dim=0)
    assert (scored.token, scored.rank) == (0, 3) and scored.logprob == pytest.approx(float(expected[0]))
    assert scored.top == [(2, pytest.approx(float(expected[2])))]


def test_an_end_that_is_banned_may_come_where_a_grammar_allows_nothing_else() -> None:
    [chosen] = sample(torch.tensor([[5.0, 1.0, 0.0]]), [Choice(banned=[2], allowed=b"\x04", temperature=1.0)])
    assert chosen.token == 2 and not chosen.error


def sorted_reference(logits: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Every token's probability, written as the definitions are: on sorted probabilities."""
    ordered, tokens = torch.sort(logits.double() / choice.temperature, descending=True, stable=True)
    probabilities = torch.softmax(ordered, dim=0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if choice.min_p > 0:
        keep &= probabilities >= choice.min_p * probabilities[0]
    if choice.top_k > 0:
        keep[choice.top_k :] = False
    left = probabilities * keep
    if choice.top_p < 1:
        keep &= left.cumsum(0) - left < choice.top_p * left.sum()
    keep[0] = True
    return torch.zeros_like(probabilities).index_put_((tokens,), probabilities * keep / (probabilities * keep).sum())


def shaped(shape: str) -> torch.Tensor:
    logits = torch.randn(1300, generator=torch.Generator().manual_seed(1))
    match shape:
        case "peaked":
            logits *= 5
        case "ties":
            logits = (2 * logits).round()
        case "forbidden":
            logits[::2] = -torch.inf
    return logits


@pytest.mark.parametrize("split", SPLITS[1:])
@pytest.mark.parametrize("shape", ["peaked", "flat", "ties", "forbidden"])
def test_slices_choose_what_the_whole_vocabulary_does(shape: str, split: tuple[int, ...]) -> None:
    """The same token for the same seed, but where rounding decides; the same scores; whatever is asked for."""
    logits, odd = shaped(shape), {"prompt": [5, 900], "output": [5, 7, 1299], "presence": 0.5, "frequency": 0.2}
    wishes = [
        *({"temperature": 1.0} | each for each in WISHES), {}, {"logprobs": 5}, {"given": 1299, "logprobs": 0},
        {"repetition": 1.3, "logprobs": 3} | odd, {"bias": {1298: 100.0, 3: 2.0}}, {"banned": [int(logits.argmax())]},
        {"temperature": 0.7, "allowed": b"\x00" * 100 + b"\xff" * 62 + b"\x00"}, {"top_k": 65, "temperature": 3.0},
        {"temperature": 1.0, "banned": [2], "allowed": b"\x04" + b"\x00" * 162}, {"allowed": b"\x00" * 163},
        {"given": 2, "logprobs": 2000},
    ]  # fmt: skip
    choices = [Choice(**each, seed=seed, index=seed) for seed in range(12) for each in wishes]
    rows = logits.expand(len(choices), -1)
    whole, parts = sample(rows, choices), Talked(split).sample(rows, choices)
    same = [one.token == other.token and one.error == other.error for one, other in zip(whole, parts, strict=True)]
    assert sum(same) >= len(same) - 2
    for one, other in zip(whole, parts, strict=True):
        if one.token == other.token:
            likely = [[token for token, logprob in each.top if logprob > -math.inf] for each in (one, other)]
            assert one.rank == other.rank and len(one.top) == len(other.top) and sorted(likely[0]) == sorted(likely[1])
            assert other.logprob == pytest.approx(one.logprob, abs=1e-5)


def test_what_ranks_tell_each_other_of_152_000_logits() -> None:
    """Bytes a row and rank: greedy 16, which go with the program; else what this says."""
    logits = 5 * torch.randn(4, 152_000, generator=torch.Generator().manual_seed(3))
    limits: list[tuple[dict, int]] = [
        ({}, 0), ({"temperature": 1.0}, 40), ({"temperature": 1.0, "top_p": 0.9}, 600), ({"top_p": 0.5}, 0),
        ({"temperature": 1.0, "top_k": 20}, 530), ({"temperature": 1.0, "top_k": 50}, 500),
        ({"temperature": 1.0, "top_k": 5000}, 9000),
    ]  # fmt: skip
    for wishes, most in limits:
        talked = Talked((76_000, 76_000))
        choices = [Choice(**wishes, seed=9, index=i) for i in range(4)]
        assert [c.token for c in talked.sample(logits, choices)] == [c.token for c in sample(logits, choices)]
        assert talked.sent * 8 / 4 - 16 <= most, wishes  # less the likeliest ones


@pytest.mark.parametrize(
    ("helper", "wishes"),
    [("_drawn", {}), ("_sums", {}), ("_true_places", {"min_p": 0.1}), ("_likelier", {"top_p": 0.5}),
     ("_not_below", {"top_k": 40}), ("_said_few", {"top_k": 5}), ("_said_few", {"top_p": 0.5}),
     ("_histogram", {"top_k": 100}), ("_sums", {"top_p": 0.1}), ("_true_places", {"top_k": 70}),
     ("_not_below", {"top_k": 500, "top_p": 0.9})],
)  # fmt: skip
def test_a_rank_that_fails_at_its_part_ends_the_row_on_all(
    helper: str, wishes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails: else ranks would hear each other's numbers as answers to other questions."""
    from weft.execute import draws

    work, choices = getattr(draws, helper), [Choice(), Choice(temperature=1.0, **wishes), Choice(temperature=1.0)]

    def failing(*given: object, **named: object) -> object:
        if threading.current_thread().name.endswith("_1") and failing.left:  # type: ignore[attr-defined]
            failing.left -= 1  # type: ignore[attr-defined]
            raise MemoryError("planted")
        return work(*given, **named)

    failing.left = 1  # type: ignore[attr-defined]
    monkeypatch.setattr(draws, helper, failing)
    chosen = Talked((650, 650)).sample(shaped("flat").expand(3, -1), choices)
    assert sum("a rank failed at its part" in each.error for each in chosen) == 1 and not chosen[0].error


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("shape", ["peaked", "flat", "ties", "forbidden"])
def test_draws_are_distributed_as_by_sorting(shape: str, wishes: dict) -> None:
    count, logits = 3000, shaped(shape)
    choice = Choice(**{"temperature": 1.0} | wishes)
    expected = sorted_reference(logits, choice)
    rows = logits.expand(count, -1)
    wanted = [Choice(**{"temperature": 1.0} | wishes, seed=3, index=i) for i in range(count)]
    drawn = torch.tensor([chosen.token for chosen in sample(rows, wanted)])
    assert expected[drawn].min() > 0, "a token was drawn that the limits leave out"
    # Kolmogorov's distance between both, over tokens in the order of their ids and of their likelihood.
    counts = torch.bincount(drawn, minlength=1300).double() / count
    for order in (torch.arange(1300), expected.argsort()):
        distance = (counts[order].cumsum(0) - expected[order].cumsum(0)).abs().max()
        assert distance < 1.95 / count**0.5, f"{distance:.4f}"  # passed by chance once in 1000


@pytest.mark.parametrize("wishes", [{"top_k": 2000}, {"top_k": 50}, {"top_p": 0.4}, {"min_p": 0.3, "top_p": 0.99}])
def test_limits_of_a_large_vocabulary(wishes: dict) -> None:
    logits = torch.randn(20_011, generator=torch.Generator().manual_seed(2))  # no multiple of a block
    choice = Choice(temperature=1.3, **wishes)
    expected = sorted_reference(logits, choice)
    drawn = [
        c.token
        for c in sample(logits.expand(200, -1), [Choice(temperature=1.3, **wishes, index=i) for i in range(200)])
    ]
    assert expected[torch.tensor(drawn)].min() > 0 and len(set(drawn)) > 10


def test_bias() -> None:
    assert sample(LOGITS[None], [Choice(bias={3: 100.0})])[0].token == 3
    assert sample(LOGITS[None], [Choice(bias={4: -100.0})])[0].token == 0
    assert draws({"temperature": 1.0, "bias": {4: -100.0, 0: -100.0}}, 300).keys() <= {1, 2, 3}
