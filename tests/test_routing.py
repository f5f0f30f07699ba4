"""Which replica a request goes to."""

from __future__ import annotations

from weft.routing import ANSWER, BLOCK, Backlog, Router

IDLE = Backlog()
LONG = list(range(20 * BLOCK))
OTHER = list(range(10_000, 10_000 + 20 * BLOCK))


def test_a_prefix_is_worth_what_it_saves() -> None:
    router = Router(2, 32, 10**6)
    router.took(1, LONG)
    asked = [*LONG, 1, 2, 3]
    assert router.order(asked, [IDLE, IDLE]) == [1, 0]
    saved = len(LONG)  # tokens that replica 1 need not compute
    assert router.order(asked, [IDLE, Backlog(saved - 1)])[0] == 1
    assert router.order(asked, [IDLE, Backlog(saved + 1)])[0] == 0
    assert router.order(asked, [IDLE, Backlog(0, saved // ANSWER + 1)])[0] == 0


def test_the_longest_prefix_wins() -> None:
    router = Router(3, 32, 10**6)
    router.took(0, LONG[: 5 * BLOCK])
    router.took(2, LONG[: 9 * BLOCK])
    assert router.order(LONG, [IDLE] * 3) == [2, 0, 1]


def test_without_a_prefix_the_least_busy_one_gets_it_and_idle_ones_take_turns() -> None:
    router = Router(3, 32, 10**6)
    assert router.order([1, 2], [Backlog(100), Backlog(50), Backlog(0, 1)]) == [1, 2, 0]
    seen = []
    for number in range(6):
        best = router.order([number], [IDLE] * 3)[0]
        router.took(best, [number])
        seen.append(best)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_who_takes_nothing_is_left_out() -> None:
    router = Router(2, 32, 10**6)
    router.took(0, LONG)
    assert router.order(LONG, [None, Backlog(10**6, 99)]) == [1]
    assert router.order(LONG, [None, None]) == []


def test_prefixes_of_other_salts_are_others() -> None:
    router = Router(2, 32, 10**6)
    router.took(0, LONG, "hers")
    assert router.order(LONG, [Backlog(1), IDLE], "hers")[0] == 0
    assert router.order(LONG, [Backlog(1), IDLE], "his")[0] == 1
    assert router.order(LONG, [Backlog(1), IDLE])[0] == 1


def test_what_a_replica_may_have_let_go_of_is_forgotten() -> None:
    for router in (Router(2, 32, 39 * BLOCK), Router(2, 1, 10**6)):  # memory of one and a half prompts; one prompt
        router.took(1, LONG)
        router.took(1, OTHER)
        assert router.order(OTHER, [IDLE, Backlog(len(OTHER) - 1)])[0] == 1
        assert router.order(LONG, [IDLE, Backlog(1)])[0] == 0


def test_a_conversation_that_goes_on_is_one_prompt() -> None:
    router = Router(2, 2, 10**6)
    router.took(1, OTHER)
    for turns in range(1, 20):
        router.took(1, LONG[: turns * BLOCK])
    assert router.order(OTHER, [IDLE, Backlog(1)])[0] == 1, "and nothing else is forgotten for it"
    assert router.order(LONG, [IDLE, Backlog(18 * BLOCK)])[0] == 1


def test_one_whose_slots_are_taken_is_left_for_one_that_is_idle() -> None:
    router = Router(2, 32, 10**6)
    prompt = list(range(2000))
    router.took(0, prompt)
    assert router.order(prompt, [Backlog(0, 15, 16), Backlog(0, 0, 16)])[0] == 0
    assert router.order(prompt, [Backlog(0, 16, 16), Backlog(0, 0, 16)])[0] == 1


def test_where_nothing_is_kept_prefixes_count_for_nothing() -> None:
    router = Router(2, 0, 10**6)
    router.took(1, LONG)
    assert router.order(LONG, [IDLE, Backlog(1)])[0] == 0


def test_a_replica_that_was_started_again_has_nothing() -> None:
    router = Router(2, 32, 10**6)
    router.took(1, LONG)
    router.forget(1)
    assert router.order(LONG, [IDLE, Backlog(1)])[0] == 0


def test_a_prompt_of_less_than_a_block_or_none_at_all() -> None:
    router = Router(1, 32, 0)
    router.took(0, [])
    router.took(0, [1] * (BLOCK - 1))
    assert router.order([], [IDLE]) == [0]
