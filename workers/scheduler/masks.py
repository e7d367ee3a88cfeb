"""The wait of a step for its masks, which is bounded wherever it happens."""

from concurrent.futures import Future

from workers.scheduler.plan import StepMasks


def wait_for_masks(step: int, masks: "Future[StepMasks]", timeout_s: float) -> StepMasks:
    """Return the masks of a step.

    Raises:
        MasksFailed: they failed, or are not there in time.
    """
    try:
        return masks.result(timeout_s)
    except TimeoutError:
        raise MasksFailed(masks_late(step, timeout_s)) from None
    except Exception as error:
        raise MasksFailed(masks_failed(step, error)) from error


def masks_late(step: int, timeout_s: float) -> str:
    """Return the error of a step that waited too long for its masks."""
    return (
        f"step {step} has no masks of its grammars after {timeout_s:g} s (engine.parallel.step_timeout_s): "
        f"the engine's CPUs are overloaded, or computing them hangs"
    )


def masks_failed(step: int, error: BaseException) -> str:
    """Return the error of a step whose masks failed."""
    return f"the masks of step {step} failed ({type(error).__name__}); the engine's log has the details"


class MasksFailed(Exception):
    """A step has no masks; the message is one sentence."""
