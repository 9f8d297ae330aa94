"""Which tokens the positions of arrays belong to: the one rule that every consumer asks."""

from __future__ import annotations


def covered_tokens(num_tokens: int | None, num_positions: int) -> slice | None:
    """The tokens that arrays of `num_positions` belong to, one position per token, in order.

    Position p of an array is what the model computed at token p, before it saw token p + 1. Arrays
    cover all tokens, or all but the last: ``generate()`` returns N tokens, of which the last was
    never an input, so that there are N - 1 positions.

    Parameters
    ----------
    num_tokens
        Stored tokens; None if none are stored, so that positions stand for themselves.
    num_positions
        Length of the token axis of hidden states, or of the query axis of attentions.

    Returns
    -------
    slice or None
        None if the lengths say nothing about the tokens: more positions than tokens, fewer by
        more than one, or one position of several tokens, which is the last one in batches of old
        extractors and the first after ``generate()``.
    """
    if num_tokens is None or num_positions == num_tokens:
        return slice(0, num_positions)
    if num_positions == num_tokens - 1 and num_positions != 1:
        return slice(0, num_positions)
    return None


def is_one_less(num_tokens: int | None, num_positions: int) -> bool:
    """Whether arrays lack the last token's position, as after ``generate()``."""
    covered = covered_tokens(num_tokens, num_positions)
    return num_tokens is not None and covered is not None and covered.stop == num_tokens - 1
