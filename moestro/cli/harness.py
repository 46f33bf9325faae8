"""lm-eval's own command with the model `moestro` in it: `python -m moestro.cli.harness run --model moestro ...`.

lm-eval 0.4.13 finds models in its registry alone, in which a package can only put one by running first. In Python the same is
`add_model()` before `lm_eval.simple_evaluate(model="moestro", model_args="pretrained=FOLDER,memory=4GiB", ...)`.
"""

from __future__ import annotations

import atexit
import sys
from contextlib import ExitStack

from moestro.cli.errors import bad_argument, report
from moestro.cli.output import say

NAME = "moestro"


def add_model() -> None:
    """Make `moestro` known to lm-eval in this process. Raises InputError when lm-eval is not installed."""
    from moestro.cli.eval import check_harness

    check_harness()
    import lm_eval.models  # noqa: F401  # puts lm-eval's own names in
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=model_class())


def model_class() -> type:
    """The class that lm-eval makes its model of."""
    from moestro.cli.profile import _opened, _tokenizer
    from moestro.evaluate.tasks import TaskModel

    class MoestroModel(TaskModel):
        """pretrained: folder or Hub id. memory, runner, dtype, threads: as for `moestro eval`. max_length: tokens that the model may
        see at once, for which the engine keeps room; at most its context. device: lm-eval always names one, and the model runs on
        the processor whatever it is."""

        def __init__(
            self,
            pretrained: str,
            *,
            memory: str | int | None = None,
            runner: str = "auto",
            dtype: str = "auto",
            threads: int | None = None,
            max_length: int = 2048,
            batch_size: str | int = 1,
            max_batch_size: int | None = None,
            device: str | None = None,
        ) -> None:
            if str(batch_size) not in ("1", "auto") or max_batch_size is not None:
                bad_argument(f"the batch size is {max_batch_size or batch_size}", "1: requests are read one after another")
            if (tokenizer := _tokenizer(pretrained)) is None:
                bad_argument(f"{pretrained} has no tokenizer.json", "a model with its tokenizer: tasks are texts")
            stack = ExitStack()
            opened = _opened(pretrained, runner, None if memory is None else str(memory), dtype, threads, max_length)
            super().__init__(stack.enter_context(opened), tokenizer, max_length=max_length)
            atexit.register(self._finish, stack)

        def _finish(self, stack: ExitStack) -> None:
            stack.close()
            if self.cut:
                say(f"{self.cut} requests have more than {self.max_length} tokens and lost their beginning: see max_length")

    return MoestroModel


def main() -> int:
    """Run lm-eval's command."""
    try:
        add_model()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
