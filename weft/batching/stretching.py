"""Which angles turn a sequence's positions, where that depends on more than the position. Knows lengths only."""

from __future__ import annotations

from dataclasses import dataclass

from weft.batching.request import Sequence


@dataclass(frozen=True)
class Stretching:
    """`trained`: rotary angles stretch with a prompt that is longer than this many tokens; None: they never do. `anew`:
    they have two forms, for shorter and for longer sequences, and one that grows beyond is computed anew."""

    trained: int | None = None
    anew: bool = False

    def of(self, sequence: Sequence) -> int:
        """What the angles of a prompt's positions depend on beside the position; alike for all but with `trained`."""
        if self.trained is None:
            return 0
        if self.anew:
            return int(len(sequence.tokens) > self.trained)
        return max(self.trained, len(sequence.request.prompt))

    def outgrown(self, sequence: Sequence, length: int) -> bool:
        """With so many tokens, what is computed of it is of the form for shorter sequences."""
        return self.anew and self.trained is not None and not sequence.stretch and length > self.trained

    def prompt(self, sequence: Sequence) -> int:
        """Tokens by which its angles are stretched, if they are: of the prompt, or what is longer than a short one."""
        if self.trained is None:
            return 0
        return max(len(sequence.request.prompt), self.trained + 1 if self.anew and sequence.stretch else 0)

    def lasting(self, sequence: Sequence) -> int:
        """How many of its computed positions are what they would be in another sequence that begins alike."""
        most = sequence.stretch if self.trained is not None and not self.anew else sequence.computed
        return min(most, sequence.computed)
