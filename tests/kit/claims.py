"""Sentences that say that something is promised, by which tests find them in whatever is shown."""

from __future__ import annotations

import re

# Something is promised, or a promise is judged.
CLAIMS = re.compile(
    r"\b(PASS|FAIL|INCONCLUSIVE)\b|[Pp]romised was at most|>promised: at most|[Tt]he promise holds|certified: 0"
    r"|is the certified one|(the|each) promise kept|[Gg]uarantee: (ltt|pac|expectation)|With probability at least"
    r"|often than promised|stage1_threshold_certified|than the promise|by (their|its) 95% bounds"
    r"|risk of exits that was promised|threshold of the certificate"
)
# The same of the exit error, which is all that audits of exits test.
OF_EXITS = re.compile(
    r"[Pp]romised was at most|promised: at most|[Tt]he promise holds|Is the promise kept\?|than promised"
    r"|exits that was promised"
)
# Something was promised of exits until the threshold was tightened.
WAS = re.compile(r"\bwas promised\b")
