"""The one exception a caller catches for everything that better input would mend."""

from __future__ import annotations


class BayesLoraError(ValueError):
    """Input, options or files that cannot work.

    The message is one sentence: the value seen, the value wanted, the way out. The command line prints it as it is
    and exits with status 2.
    """
