"""How one chunk of prompt tokens is shared among the prompts that are being computed."""

from collections.abc import Sequence


def share_chunk(left: Sequence[int], budget: int) -> list[int]:
    """Tokens of the next step for each prompt; ``left``: what each still needs, in order of arrival.

    The oldest has half, so every prompt, however long, is through in bounded time once those before it are. The rest
    goes to the prompts that need least, so a short one does not wait behind a long one. Nothing is left over while
    anybody needs it.
    """
    shares = [0] * len(left)
    if not left:
        return shares
    shares[0] = min(left[0], -(-budget // 2))
    budget -= shares[0]
    for prompt in sorted(range(1, len(left)), key=left.__getitem__):
        shares[prompt] = min(left[prompt], budget)
        budget -= shares[prompt]
    shares[0] += min(left[0] - shares[0], budget)
    return shares
