"""Run lm-eval's command after importing bayeslora, so that `peft=` accepts any run of `bayeslora train`.

    python examples/lm_eval/run.py run --model hf --model_args pretrained=BASE,peft=RUN --tasks local_choices \
        --include_path examples/lm_eval --metadata '{"file": "data/arc_easy/test.jsonl"}' --batch_size 8

All options are lm-eval's. A variational adapter answers with its posterior mean. An adapter exported with
`bayeslora export --format lora` does not need this wrapper: use `lm_eval run` with the same options.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import bayeslora  # noqa: F401 - importing it registers the methods with PEFT

if __name__ == "__main__":
    cli_evaluate()
