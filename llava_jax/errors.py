"""What can go wrong in a way that the user can mend, and the exit code of each (a contract, see README)."""


class UserError(Exception):
    """Wrong input. The message names the rule, the value and the remedy; the command line prints it alone."""

    exit_code = 2


class NumericsError(UserError):
    """A loss or gradient that is not finite; nothing was updated or saved."""

    exit_code = 65


class DataError(UserError):
    """Records that cannot be read, or too many refused ones."""

    exit_code = 66


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written, or that belongs to another run or model."""

    exit_code = 74


class Preempted(UserError):
    """The run was asked to stop; it saved, and the same command continues it."""

    exit_code = 75


class Stalled(UserError):
    """No step ended for too long; the stacks of all threads were written."""

    exit_code = 76


def exit_code(error: BaseException | None) -> int:
    """The code that a run ends with: configs check themselves with plain ValueErrors, which are wrong usage."""
    match error:
        case None:
            return 0
        case UserError():
            return error.exit_code
        case ValueError():
            return 2
        case KeyboardInterrupt():
            return 130
    return 70


class Refused(Exception):
    """One record that cannot be used: counted by `reason`, shown by `detail`, and the run goes on."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
