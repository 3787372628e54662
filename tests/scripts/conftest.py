"""What the tests of scripts share: every figure that one writes is checked."""

from readable import figures_fit_for_a_paper

__all__ = ["figures_fit_for_a_paper"]
