"""Values of gold answers that only sympy can compute, such as integrals and limits.

Only gold answers are read here: sympy has no bounds on its time, and predictions are not trusted.
"""

from __future__ import annotations

import functools
from typing import Any

from grpo.rewards.verifier.evaluate import CONTEXT, DIGITS


@functools.lru_cache(maxsize=256)
def constant_of_sympy(text: str) -> Any | None:
    """Returns the value of a formula without variables, None if sympy finds none.

    Args:
        text: A normalized gold answer.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy

    # antlr and sympy raise exceptions of many types.
    try:
        value = sympy.N(latex2sympy(text, normalization_config=None).doit(), DIGITS)
        if not (value.is_number and value.is_finite):
            return None
        real, imaginary = value.as_real_imag()
        if imaginary == 0:
            return CONTEXT.mpf(str(real))
        return CONTEXT.mpc(str(real), str(imaginary))
    except Exception:
        return None
