"""The one tree of the agents' errors: whose fault each is, and whether the same may succeed later.

On the right, the module below ``agents``::

    AgentError
    ├── MemoryPlacementError     memory that no NIC and no other process can reach   memory.errors
    │   ├── PagesUnavailable         weights that cannot lie in pages of ours
    │   └── StandbyMissing           no memory for a second set of them
    ├── FlipFailed, PagesTorn    sets of pages that did not change places            memory.errors
    │   └── StandbyLost              … and of which one has no memory any more
    ├── DriverError              a call of the CUDA driver that failed               memory.pages.driver
    ├── NicError                 a GPU without a network port                        memory.nic
    ├── NetDeviceMissing         a network device that the host does not have        memory.nic
    ├── RunTableError            copies or rows that do not fit their layout         tables.runs
    ├── ApplicantError           an engine that cannot say where it is               link.applicant
    ├── TlsError                 files or variables by which no TLS can be spoken    link.tls
    ├── GroupError               vLLM's process group did not carry a message        link.process_group
    ├── RefusedForGood           the daemon does not want this agent                 link.connection
    ├── PlanMismatch             a Connect that does not say what it claims          transport.shares
    ├── UnknownTransport         a Welcome with a transport that is not registered   transport.registry
    ├── CheckpointError          saved parts that do not make up whole tensors       transport.filesystem
    ├── ChunksMissing            chunks that never came, or could not be scattered   transport.nixl.arrivals
    ├── NixlError                the data plane over NIXL                            transport.nixl.errors
    │   ├── NixlMissingError, RegionError, MetadataError, ConnectError, EdgeError
    │   └── TransferError            one peer was not written
    │       └── DeadlineError, StalledError, StoppedError, DisconnectedError, ImplausibleRateError
    ├── TrainerError             a trainer's tensors or its table                    trainer.errors
    │   ├── MissingTensor, ChangedTensor, UnsupportedPlacement, …
    │   └── StreamError              a stream that is not what a version needs       trainer.streams.streamed
    ├── TrainerSettingsError     where a trainer's daemon and run are                trainer.options
    ├── PublishError             a version that was not committed                    trainer.publication
    │   └── BusyError                an earlier version still needs the slots
    ├── InfoError                the body of an engine's call                        inference.calls
    ├── PlaceError               an engine that is not told whose it is              inference.place
    ├── UpdateFailed             a round that was not committed here                 inference.window
    ├── NotLanded                less than a whole version has landed                inference.weights
    ├── Superseded               an audit of weights that are served no more         inference.shadow
    ├── ModeRefused              a way of landing that an engine cannot have         inference.modes
    ├── AgentStuck               an agent's thread that does not end                  inference.agent
    ├── RecordError              a model whose layout cannot be recorded             recorder.trace
    │   └── UnprovedPlace        a parameter whose place after processing is not proved  recorder.recording
    ├── GuardUnavailable         admin routes that nothing could stand before        vllm.guard
    ├── RoutesError              routes that cannot be opened to clients             vllm.routes
    ├── RanksError               a parallel configuration that contradicts itself    vllm.ranks
    ├── UnreadWeights            a layer that does not read what a round writes      vllm.probe
    ├── HoldsWeights             a setting by which copies of weights are kept       vllm.holders.settings
    ├── AdapterRefused           an adapter that rounds cannot write as declared     vllm.lora.declared
    ├── BalancerBusy             experts still being moved in the background         vllm.holders.balancer
    ├── BalancerUnknown          a vLLM whose background moves cannot be stopped     vllm.holders.balancer
    └── UnsupportedVllm          a vLLM that no adapter knows                        vllm.adapter.choose

Errors of other libraries are chained below one of these where the reason is known. What is not (torch out of memory,
a bug) is blamed on the process that it happened in, and may be tried again. Where decisions are made, ``blame`` reads
``fault`` and ``retry``: the rendezvous, CLOSED and VERIFIED. The kernels' errors are a small tree of their own
(``weightsync.kernels.errors``); refusals that vLLM's callers read as text are in ``agents.vllm.hold`` and ``gate``.
"""

from weightsync.kernels.errors import KernelError
from weightsync.orchestrator.protocol.messages import Fault


class AgentError(Exception):
    """Base of all errors that the agents raise themselves.

    Attributes:
        fault: who must change something.
        retry: whether the same attempt may succeed later without that.
    """

    fault: Fault = "config"
    retry: bool = False


def blame(error: BaseException, here: Fault) -> tuple[Fault, bool]:
    """Whose fault ``error`` is and whether to try again; ``here`` is the kind of process in which it was raised."""
    if isinstance(error, AgentError):
        return error.fault, error.retry
    return here, not isinstance(error, KernelError)
