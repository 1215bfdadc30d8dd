"""The client guide's sessions, typed in against a cluster: what they show is what comes out."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from tests.worlds.cluster import cluster_world

GUIDE = Path(__file__).parents[2] / "docs" / "client-guide.md"


def test_the_sessions_of_the_client_guide_are_true(tmp_path: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    sessions = "\n".join(re.findall(r"^```pycon\n(.*?)^```", text, re.M | re.S))
    with cluster_world(tmp_path, "--nodes", "2") as world:
        session = doctest.DocTestParser().get_doctest(
            sessions.replace("127.0.0.1:7400", world.address), {}, "client-guide.md", str(GUIDE), 0
        )
        assert len(session.examples) > 15
        told: list[str] = []
        runner = doctest.DocTestRunner(verbose=False)
        outcome = runner.run(session, out=told.append, clear_globs=False)
        session.globs["db"].close()
        assert not outcome.failed, "".join(told)
