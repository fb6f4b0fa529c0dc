"""What the first cell of a notebook does on a hosted machine, where each notebook starts on a new one."""


def prepare(notebook: str, learner: str | None = None) -> None:
    """Install what the notebooks need, and run those that come before `notebook`."""
    raise NotImplementedError
