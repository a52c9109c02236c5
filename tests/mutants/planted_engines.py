"""Bugs of the agent in an engine, for ``plant`` to plant: what lands there, and whether it is served."""

from typing import Final

from plant import Mutant, in_agents

_SHADOW: Final = "inference/shadow.py"
_WEIGHTS: Final = "inference/weights.py"
_WINDOW: Final = "inference/window.py"
_AGENT: Final = "inference/agent.py"
_ARRIVALS: Final = "transport/nixl/arrivals.py"

ENGINES: Final[tuple[Mutant, ...]] = (
    in_agents(
        "what has landed is overwritten during a switch",
        _SHADOW,
        (
            "            if self._switching:\n"
            "                self._deferred.append(word)  # what has landed is read until the switch is over\n"
            "                return\n"
        ),
        "",
    ),
    in_agents(
        "what stands by counts although writers are let in again",
        _SHADOW,
        "        if name != self._landing:\n            self._forget()\n            self._landing = name\n",
        "        self._landing = name\n",
    ),
    in_agents(
        "what was dropped while it was verified stands by",
        _SHADOW,
        (
            "            if self._landing != order.round:\n"
            "                return  # it was dropped meanwhile, and perhaps something else lands there now\n"
        ),
        "",
    ),
    in_agents(
        "what could not be verified stands by",
        _SHADOW,
        "            if not word.error:\n                self._holdings.keep(",
        "            if True:\n                self._holdings.keep(",
    ),
    in_agents(
        "another version than the one that stands by is served",
        _SHADOW,
        "            if self.serves(order.version) or standby == order.version:\n",
        "            if self.serves(order.version) or standby is not None:\n",
    ),
    in_agents(
        "a switch that failed half-way leaves whole weights",
        _SHADOW,
        "                else:\n                    self._tear()\n                fault, retry",
        "                fault, retry",
    ),
    in_agents(
        "live memory that differs from what was verified is served",
        _SHADOW,
        '(%s); torn", switch.version, why)\n                self._tear()\n',
        '(%s); torn", switch.version, why)\n',
    ),
    in_agents(
        "an audit judges the switch after it",
        _SHADOW,
        "            if self._last is not switch:\n                return  # another",
        "            if False:\n                return  # another",
    ),
    in_agents(
        "a hold of which a switch knew nothing is over",
        _SHADOW,
        "            self._holdings.hold(True, because)\n",
        "            pass\n",
    ),
    in_agents(
        "of torn pages the standby counts",
        _SHADOW,
        ("        self._holdings.tear(True)\n        if self._weights.swaps:\n            self._holdings.keep(None)\n"),
        "        self._holdings.tear(True)\n",
    ),
    in_agents(
        "something lands although standby is lost",
        _SHADOW,
        "        if self._lost is not None:\n            log.error",
        "        if False:\n            log.error",
    ),
    in_agents(
        "less than the model lands",
        _WEIGHTS,
        "            if (found := table_bytes(table)) != self.bytes:\n",
        "            if (found := table_bytes(table)) < 0:\n",
    ),
    in_agents(
        "places of parameters are not looked at before the decision",
        _WEIGHTS,
        "        self.check()  # here too, where nothing is decided yet\n",
        "",
    ),
    in_agents(
        "standby is digested before all has come to it",
        _WEIGHTS,
        "            self.arrive(version)  # what has not passed the landing is brought to standby, too\n",
        "",
    ),
    in_agents(
        "what is derived stays that of the version before, after a flip",
        _WEIGHTS,
        "            self._flip(model)\n            model.refresh()\n",
        "            self._flip(model)\n",
    ),
    in_agents(
        "what is derived stays that of the version before, after a copy",
        _WEIGHTS,
        "        self._arrival.scatter()\n        model.refresh()\n",
        "        self._arrival.scatter()\n",
    ),
    in_agents(
        "copied by another plan than it was digested by",
        _WEIGHTS,
        "        self._arrival.scatter()\n",
        "        self._landed().scatter()\n",
    ),
    in_agents(
        "an audit of pages that were exchanged meanwhile",
        _WEIGHTS,
        "                    if self._flips != flips:\n",
        "                    if False:\n",
    ),
    in_agents(
        "memory that late writers reach is free for others",
        _WEIGHTS,
        "            for memory in left:\n                quarantine(memory)\n",
        "            pass\n",
        "inference/test_lending.py",
    ),
    in_agents(
        "samples of the set that was served before",
        _WEIGHTS,
        "        self._samples().exchange()\n",
        "",
    ),
    in_agents(
        "places of parameters are not looked at in a paused engine",
        _WEIGHTS,
        "        self._model.check()\n        self._model.refresh()\n",
        "        self._model.refresh()\n",
    ),
    in_agents(
        "what no round writes stays behind at a flip",
        "inference/standby.py",
        "        if self._carry is not None:\n            self._carry()\n",
        "",
    ),
    in_agents(
        "memory that was written to is whole after a round that failed",
        _WINDOW,
        "torn=self._torn_on_leave or self.holdings.status.torn)",
        "torn=self.holdings.status.torn)",
        "inference/test_agent.py",
    ),
    in_agents(
        "memory that was torn before is whole after a round that failed",
        _WINDOW,
        "torn=self._torn_on_leave or self.holdings.status.torn)",
        "torn=self._torn_on_leave)",
    ),
    in_agents(
        "a commit of another version",
        _WINDOW,
        "if named == name and version == update.version:",
        "if named == name:",
    ),
    in_agents(
        "an abort that comes before its round is forgotten",
        _WINDOW,
        "            elif isinstance(word, Abort) and word.round not in self._ended:\n",
        "            elif False:\n",
    ),
    in_agents(
        "torn memory is mended by a commit of what was not verified",
        _WINDOW,
        "case Commit(version=version) if written.verified and version == written.version:",
        "case Commit(version=version) if version == written.version:",
    ),
    in_agents(
        "memory that was torn before the round is whole after its abort",
        _WINDOW,
        "            case Abort(torn=False) if written.whole:\n",
        "            case Abort(torn=False):\n",
    ),
    in_agents(
        "nobody leaves although the daemon's lease is over",
        _WINDOW,
        "            if not self._torn_on_leave and self._abandoned():\n",
        "            if False:\n",
        "inference/test_agent.py",
    ),
    in_agents(
        "a round of a daemon that is not obeyed",
        _AGENT,
        "        if epoch != agent.epoch:\n",
        "        if False:\n",
    ),
    in_agents(
        "a switch to what landed for experts that have moved since",
        _AGENT,
        '        if not self._weights.follow_experts():\n            return ""\n',
        '        return ""\n',
    ),
    in_agents(
        "experts are written while the balancer moves them",
        _AGENT,
        "        self._drain(info.deadline_seconds)\n        if not self",
        "        if not self",
    ),
    in_agents(
        "a change from outside is not seen",
        _AGENT,
        "            if self._weights.digest_anew() == before:\n                return\n",
        "            return\n",
    ),
    in_agents(
        "a worker that has obeyed one run is given to another",
        _AGENT,
        "            if old.epoch:\n                self._require_the_same_place(info)\n",
        "",
    ),
    in_agents(
        "peers of an engine that serves may write what it serves",
        "transport/nixl/receiver.py",
        '    if layout.lands == "live":\n        return layout.regions\n    return',
        "    if layout.regions:\n        return layout.regions\n    return",
    ),
    in_agents(
        "chunks that never came are not missed",
        _ARRIVALS,
        "            if missing:\n",
        "            if False:\n",
    ),
    in_agents(
        "a chunk of another round is scattered",
        _ARRIVALS,
        'if edge is None or notice.what != "landed" or notice.round != self._round:',
        'if edge is None or notice.what != "landed":',
    ),
    in_agents(
        "a chunk in a place that is not free is scattered",
        _ARRIVALS,
        "        if not self._may_land(edge, notice.chunk):\n",
        "        if False:\n",
    ),
)
