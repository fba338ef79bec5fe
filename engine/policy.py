"""The decisions of the scheduler: what each request may compute in a step, who must yield its blocks. Pure."""

from collections.abc import Sequence


def share_budget(pending: Sequence[int], budget: int) -> list[int]:
    """Return the tokens that each running request computes in this step.

    Decodes (one pending token) come first, so that a long prompt never stalls them; what is left goes to the prompts,
    oldest first, in chunks. Nobody starves: there are never more running requests than tokens in a step.

    Args:
        pending: tokens left to compute, of each request, oldest first; 0 of one that has to wait.
        budget: tokens of the whole step.
    """
    left = budget - pending.count(1)
    if left >= 0 and len(pending) + left == budget:
        return [1] * len(pending)
    left = budget
    shares = [0] * len(pending)
    for is_prompt in (False, True):
        for at, tokens in enumerate(pending):
            if (tokens > 1) is is_prompt and left > 0:
                shares[at] = min(tokens, left)
                left -= shares[at]
    return shares


def choose_victims(
    missing_blocks: Sequence[int], held_blocks: Sequence[int], can_yield: Sequence[bool], available_blocks: int
) -> list[int]:
    """Return which running requests to preempt so that the others get the blocks that they miss.

    The youngest yields first, even if it is the one that misses a block. So the oldest always gets on, and since a
    request that the whole pool cannot hold was never accepted, all end at last.

    Args:
        missing_blocks: of each request, oldest first.
        held_blocks: what each gives back when it yields.
        can_yield: requests that cannot never miss blocks either.
        available_blocks: to be had without preemption.
    """
    victims: list[int] = []
    needed = sum(missing_blocks)
    for at in reversed(range(len(missing_blocks))):
        if needed <= available_blocks:
            break
        if can_yield[at]:
            victims.append(at)
            needed -= missing_blocks[at]
            available_blocks += held_blocks[at]
    assert needed <= available_blocks, "a request that cannot yield misses blocks"
    return victims


def admission_headroom(num_growing: int) -> int:
    """Return how many blocks must stay available when another request is let in.

    One for each request that still grows: without it, the next block that a running request needs would cost a
    preemption, perhaps of the request just let in. Nothing when none is running: so a lone request gets everything.
    """
    return num_growing
