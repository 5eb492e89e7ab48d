"""Errors name options as a user of the command types them."""

from __future__ import annotations

import pytest

from bayeslora.errors import spelled_as_options

OPTIONS = {name: name for name in ("target_bops", "target_bops_of", "gates", "mode", "r", "rotate", "tinit", "tfinal")}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("target_bops is 2.0, but must be below 1", "--target-bops is 2.0, but must be below 1"),
        ("target_bops and target_bops_of are given", "--target-bops and --target-bops-of are given"),
        ("use gates='paper', or such as r=8: rotate=True", "use --gates paper, or such as --r 8: --rotate"),
        ("drop rotate=False", "drop --no-rotate"),
        ("mode is 'x', but the gates have one mode", "--mode is 'x', but the gates have one mode"),
        ("the cost in mode 'ra' is a rank r = 8", "the cost in --mode ra is a rank r = 8"),
        ("the mode 'ra' has a rank", "the mode 'ra' has a rank"),
        ("mode 'x' has none: use mode 'q' or 'ra'", "--mode x has none: use --mode q or ra"),
        ("mode is 'x', but must be 'q+ra' or 'q': use 'q'", "--mode is 'x', but must be q+ra or q: use q"),
        ("gates is 'x', but mode is 'y': it's the runs' part", "--gates is 'x', but mode is 'y': it's the runs' part"),
        ("tinit 20 and tfinal 30 leave none", "--tinit 20 and --tfinal 30 leave none"),
        ("hess_init is 0", "--ivon-hess-init is 0"),
        ("--target_bops needs it", "--target_bops needs it"),
        ("write BLoraConfig(r=8)", "write BLoraConfig(r=8)"),
        ("/runs/target_bops/x, 'target_bops', args.target_bops, target_bops.json, target_bops()",) * 2,
    ],
)
def test_fields_become_options(sentence: str, expected: str) -> None:
    assert spelled_as_options(sentence, {**OPTIONS, "hess_init": "ivon_hess_init"}) == expected
