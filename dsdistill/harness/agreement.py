"""Decisions on which several processes must agree, such as those that a clock or a file makes.

Each process could decide otherwise, and processes that diverge wait for each other without end. So
one decides, and sends what it chose to the others.
"""

from collections.abc import Callable
from typing import Any

from dsdistill.harness.errors import UserError

Answer = dict[str, Any]  # the choice as `value`, or the message of an error as `error`


def decide(
    choose: Callable[[], Any], *, decides: bool, broadcast: Callable[[Answer], Answer]
) -> Any:
    """Return in every process what one of them chooses.

    Args:
        choose: Function that only the deciding process calls; its result can be broadcast.
        decides: Whether this process is the deciding one.
        broadcast: Returns the answer of the deciding process in every process. Every process calls
            it once, with its own answer, which is empty where it does not decide.

    Raises:
        UserError: In every process, if `choose` raises it or an OSError.
    """
    answer: Answer = {}
    if decides:
        try:
            answer = {"value": choose()}
        except (UserError, OSError) as error:
            answer = {"error": str(error)}
    answer = broadcast(answer)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]
