"""Bugs of what stands between the weights in a vLLM and its clients, for ``plant`` to plant."""

from typing import Final

from plant import Mutant, in_agents

_GATE: Final = "vllm/gate.py"
_HOLD: Final = "vllm/hold.py"
_BOUNDARY: Final = "vllm/boundary.py"
_WORKERS: Final = "vllm/workers.py"

HOLDS: Final[tuple[Mutant, ...]] = (
    in_agents(
        "a batch on torn weights passes the gate",
        _GATE,
        "    if agent.may_run:\n",
        "    if agent.may_run or agent.status.torn:\n",
    ),
    in_agents(
        "a batch passes the gate during a round",
        _GATE,
        "    if agent.may_run:\n",
        "    if agent.may_run or agent.status.window:\n",
    ),
    in_agents(
        "a worker without an agent may serve",
        _GATE,
        '    if agent is None:\n        return "this worker has no weightsync agent"\n    if agent.may_run:\n',
        "    if agent is None or agent.may_run:\n",
    ),
    in_agents(
        "a worker that cannot look may serve",
        _GATE,
        (
            'weights may be served")\n'
            '        return WorkerReport(nonce, rank, f"{type(error).__name__}: {error}", False)\n'
        ),
        'weights may be served")\n        return WorkerReport(nonce, rank, "", False)\n',
    ),
    in_agents(
        "a worker that cannot look can switch",
        _GATE,
        (
            'say whether it can switch")\n'
            '        return WorkerReport(nonce, rank, f"{type(error).__name__}: {error}", False)\n'
        ),
        'say whether it can switch")\n        return WorkerReport(nonce, rank, "", False)\n',
    ),
    in_agents(
        "a hold is not asked for",
        _GATE,
        '        reason = reason or (agent.held_because and f"held: {agent.held_because}")\n',
        "",
    ),
    in_agents(
        "a call that fails in one rank fails in all",
        _GATE,
        '        return CallOutcome(rank, error=f"{type(error).__name__}: {error}")\n\n\ndef call_around',
        "        raise\n\n\ndef call_around",
    ),
    in_agents(
        "an engine is born unpaused",
        _HOLD,
        "            workers.pause_all(self)  # before anybody else has seen it",
        "            # before anybody else has seen it",
    ),
    in_agents(
        "anybody may resume an engine",
        _HOLD,
        "            require_servable(self, means)\n",
        "",
    ),
    in_agents(
        "requests are run to their end on torn weights",
        _HOLD,
        '            if refusals and mode == "wait":\n',
        "            if False:\n",
    ),
    in_agents(
        "an abort that leaves requests to run on torn weights",
        _HOLD,
        "                workers.pause_all(self)  # mode=abort lets requests that hold KV blocks run\n",
        "                pass\n",
    ),
    in_agents(
        "an update of an engine that serves",
        _HOLD,
        '        if method == "update_weights":\n            _require_paused(core)\n',
        "",
    ),
    in_agents(
        "sleep takes the weights from under registered memory",
        _HOLD,
        "            if level >= 1:\n",
        "            if level >= 2:\n",
    ),
    in_agents(
        "a call of which nobody knows what it does to the weights is not looked at",
        _HOLD,
        "    if worker_calls.is_vouched_for(method):\n",
        "    if False:\n",
    ),
    in_agents(
        "a peer's refusal does not count",
        _HOLD,
        "    if _refused_by_a_peer(core, bool(refusals)) and not refusals:\n",
        "    if False:\n",
    ),
    in_agents(
        "places are not asked beside the last batches",
        _BOUNDARY,
        "        _require(core, gate.ready, order)\n",
        "",
    ),
    in_agents(
        "a switch of ranks of which one cannot",
        _BOUNDARY,
        "        _require(core, gate.switchable, order)\n",
        "",
    ),
    in_agents(
        "a switch under batches in flight",
        _BOUNDARY,
        "        drain(core)\n",
        "",
    ),
    in_agents(
        "an engine that refused a switch stays paused",
        _BOUNDARY,
        "    except BaseException:\n        core.scheduler.set_pause_state(before)\n        raise\n",
        "    except BaseException:\n        raise\n",
    ),
    in_agents(
        "caches of the weights before are kept",
        _BOUNDARY,
        "        kv.forget(core, order.cache)\n",
        "",
    ),
    in_agents(
        "a switch of one of several cores that meet",
        _BOUNDARY,
        "    _require_no_meeting(core)\n",
        "",
    ),
    in_agents(
        "an answer to an earlier question is believed",
        _WORKERS,
        '    if any(getattr(report, "nonce", None) != nonce for report in reports):\n',
        "    if False:\n",
        "vllm/test_workers.py",
        "vllm/test_hold.py",
    ),
    in_agents(
        "whoever took a worker's place is meant, too",
        _WORKERS,
        "        if means is not None and means.get(report.rank) != report.incarnation:\n",
        "        if False:\n",
        "vllm/test_workers.py",
        "vllm/test_hold.py",
    ),
)
