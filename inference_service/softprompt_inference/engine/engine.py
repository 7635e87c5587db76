"""The engine: commands in, one step at a time out.

What it does is a function of the order of its commands and steps, and of when a grammar was compiled. Nothing that
one request holds can end another, and no exception leaves `handle` or `step` but EngineBroken.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from softprompt_api.errors import AdapterInvalid, AdapterNotFound, InternalError, InvalidArgument, SoftpromptError

from softprompt_inference.engine.compiling import Compiling
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.loading import Loading
from softprompt_inference.engine.lora import LoraSlots, check_lora
from softprompt_inference.engine.messages import (
    ITEM_BYTES,
    Abort,
    AbortSearch,
    AddRequest,
    Command,
    DropAdapter,
    FindNearest,
    LoadAdapter,
    LoadLora,
    Nearest,
    Output,
    Ping,
    SoftPromptPart,
    StepResult,
)
from softprompt_inference.engine.plan import Pending, Runner, Search, StepPlan
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.engine.scheduler import Scheduler, failure
from softprompt_inference.engine.sequence import Sequence

_log = logging.getLogger(__name__)

# A device that fails this often in a row will not recover within the process.
MAX_FAILED_STEPS = 3
# An engine with nothing else to do looks for commands this often while a grammar is compiled.
_COMPILING_WAIT_S = 0.01


class EngineBroken(Exception):
    """The model failed in several steps in a row; only a new process can help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """A step that the runner has begun."""

    plan: StepPlan
    pending: Pending


class Engine:
    """Serves many requests over one model in one batch.

    Args:
        runner: the model.
        config: limits of the batch; sizes of memory come from the runner.

    Raises ValueError when the KV cache is too small for one sequence of full length.
    """

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        info = runner.info
        self.info = info
        self._runner = runner
        self._virtual_ids = VirtualIds(info.vocab_size)
        self._lora_slots = LoraSlots(config.max_loras)
        self._loading = Loading()
        self._max_lora_rank = config.max_lora_rank
        # How to make the error anew: a raised one would keep its frames, and with them the adapter's rows.
        self._load_errors: dict[str, Callable[[], SoftpromptError]] = {}
        self._failed_loads: list[str] = []  # not told yet
        self._dropping: set[str] = set()
        self._searches: dict[int, FindNearest] = {}  # the oldest first
        self._search: Search | None = None  # the oldest, once it has begun
        self._found: list[Nearest] = []
        self._refused: list[Output] = []
        self._failed_steps = 0
        self._looks_ahead = config.looks_ahead(info.device)
        self._shares = config.share
        self._own_salts = itertools.count()
        self._newest: Sequence | None = None
        self._compiling = Compiling()
        self._launched: _Launched | None = None  # ahead of the step whose outputs were last returned
        self._scheduler = Scheduler(
            num_pages=info.num_pages,
            page_size=info.page_size,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_num_sequences=config.max_num_sequences,
            max_step_tokens=config.step_tokens(info.device),
            min_prompt_tokens=config.min_prompt_tokens(info.device),
            enable_prefix_caching=config.enable_prefix_caching,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._has_steps or bool(self._compiling)

    @property
    def _has_steps(self) -> bool:
        has_answers = bool(self._refused or self._searches or self._found or self._failed_loads)
        return self._scheduler.has_work or has_answers or bool(self._loading) or self._launched is not None

    def handle(self, command: Command) -> None:
        """Carry out one command; what cannot be done becomes an output of the request concerned."""
        match command:
            case AddRequest():
                self.add(command)
            case Abort(request_id=request_id):
                self.abort(request_id)
            case LoadAdapter():
                self.load_adapter(command)
            case LoadLora():
                self.load_lora(command)
            case DropAdapter(digest=digest):
                self.drop_adapter(digest)
            case FindNearest():
                self.find_nearest(command)
            case AbortSearch(search_id=search_id):
                self.abort_search(search_id)
            case Ping():  # the step behind it is the answer
                pass

    def add(self, request: AddRequest) -> None:
        """Queue a request, once its adapters are loaded; a refusal is an output of the next step."""
        if self._loading and not self._has(request.request_id) and self._loading.keep(request):
            return
        wanted = request.params.structured_outputs
        try:
            sequence = self._make_sequence(request)
            matcher = None if wanted is None else self._runner.compile(wanted)
        except SoftpromptError as error:
            self._refused.append(failure(request.request_id, error))
            return
        if matcher is None:
            self._scheduler.add(sequence)
        else:
            self._compiling.add(sequence, matcher)

    def _make_sequence(self, request: AddRequest) -> Sequence:
        if self._has(request.request_id):
            raise InvalidArgument(f"request id {request.request_id} is in use", field="request_id")
        for digest in request.adapters:
            if error := self.load_error(digest):
                raise error
        if not self._shares and any(isinstance(part, SoftPromptPart) for part in request.prompt):
            # Nobody else's pages begin like these; its own are still found when it was preempted.
            request = replace(request, salt=f"{request.salt}\0{next(self._own_salts)}")
        sequence = make_sequence(
            request,
            virtual_ids=self._virtual_ids,
            lora_slots=self._lora_slots,
            max_model_len=self.info.max_model_len,
        )
        if self._newest is not None:  # the choices of a request come one behind the other
            sequence.share_keys(self._newest)
        self._newest = sequence
        return sequence

    def _has(self, request_id: str) -> bool:
        return request_id in self._scheduler or request_id in self._compiling or self._loading.holds(request_id)

    def abort(self, request_id: str) -> None:
        """Forget a request; its pages are free at once, also those that a launched step will write to."""
        self._loading.remove(request_id)
        self._compiling.remove(request_id)
        self._scheduler.abort(request_id)

    def load_adapter(self, adapter: LoadAdapter) -> None:
        """Give an adapter virtual ids; the next steps take in keys and values.

        A failure is told to the requests that ask for it.
        """
        if not self._is_resident(adapter.digest):
            load = self._begin_key_values if adapter.are_key_values else self._load_rows
            self._load(adapter.digest, partial(load, adapter))

    def load_lora(self, lora: LoadLora) -> None:
        """Give a LoRA a slot, which the next steps fill; a failure is told to the requests that ask for it."""
        if not self._is_resident(lora.digest):
            self._load(lora.digest, partial(self._begin_lora, lora))

    def load_error(self, digest: str) -> SoftpromptError | None:
        """Why the adapter that was to be loaded last under this digest is not there; None where it is."""
        make = self._load_errors.get(digest)
        return None if make is None else make()

    def _is_resident(self, digest: str) -> bool:
        """Whether somebody who loads it now finds it there; then it stays."""
        self._dropping.discard(digest)
        return digest in self._virtual_ids or digest in self._lora_slots

    def _load(self, digest: str, load: Callable[[], None]) -> None:
        self._load_errors.pop(digest, None)
        try:
            load()
        except Exception as error:
            self._keep_load_error(digest, error)

    def _keep_load_error(self, digest: str, error: Exception) -> None:
        if isinstance(error, SoftpromptError):
            self._load_errors[digest] = partial(type(error), error.message, field=error.field)
        else:
            _log.error("adapter %s could not be put on the device", digest, exc_info=error)
            self._load_errors[digest] = partial(InternalError, "the adapter could not be put on the device")
            self._failed_loads.append(digest)

    def _load_rows(self, adapter: LoadAdapter) -> None:
        self._check_rows(adapter)
        ids = self._virtual_ids.assign(adapter.digest, adapter.num_virtual_tokens)
        try:
            self._runner.load_rows(ids.start, adapter)
        except BaseException:  # Ctrl-C too: who called may go on, and load it anew
            self._virtual_ids.retire(adapter.digest)
            raise

    def _begin_key_values(self, adapter: LoadAdapter) -> None:
        self._check_rows(adapter)
        ids = self._virtual_ids.assign(adapter.digest, adapter.num_virtual_tokens, are_key_values=True)
        self._begin(adapter.digest, self._runner.load_key_values(ids.start, adapter))

    def _begin_lora(self, lora: LoadLora) -> None:
        check_lora(lora, max_rank=self._max_lora_rank)
        self._begin(lora.digest, self._runner.load_lora(self._lora_slots.assign(lora.digest), lora))

    def _begin(self, digest: str, pieces: Iterator[None]) -> None:
        self._loading.begin(digest, pieces)
        self._load_piece()  # small ones are there at once

    def _load_piece(self) -> None:
        """Load one piece of one adapter; once it is there, or failed, queue or refuse those who waited for it."""
        if not self._loading:
            return
        digest = self._loading.first
        try:
            if not self._loading.advance(digest):
                return
        except Exception as error:
            self._keep_load_error(digest, error)
            self._free(digest)
        except BaseException:  # Ctrl-C: who called may go on with other requests
            self._load_errors[digest] = partial(InternalError, "the adapter's loading was interrupted")
            self._free(digest)
            self._loading.end(digest)
            raise
        for request in self._loading.end(digest):
            self.add(request)

    def _free(self, digest: str) -> None:
        """Take an adapter off the device, however much of it has come in."""
        if digest in self._lora_slots:
            self._runner.drop_lora(self._lora_slots.retire(digest))
        else:
            self._runner.drop_rows(self._virtual_ids.retire(digest).start)
        self._dropping.discard(digest)

    def _check_rows(self, adapter: LoadAdapter) -> None:
        info = self.info
        if adapter.dtype not in ITEM_BYTES:
            raise AdapterInvalid(f"rows of dtype {adapter.dtype} are not supported", field="tensors")
        if adapter.are_key_values and info.no_key_values:
            raise AdapterInvalid(f"adapters of keys and values are not served: {info.no_key_values}")
        row_size = info.key_value_row_size if adapter.are_key_values else info.hidden_size
        if adapter.row_size != row_size:
            what = "keys and values are" if adapter.are_key_values else "hidden size is"
            raise AdapterInvalid(
                f"the rows have {adapter.row_size} values; the model's {what} {row_size}", field="tensors"
            )
        if not 1 <= adapter.num_virtual_tokens <= info.max_virtual_tokens:
            raise AdapterInvalid(
                f"the adapter has {adapter.num_virtual_tokens} virtual tokens; "
                f"1 to {info.max_virtual_tokens} are allowed",
                field="config.num_virtual_tokens",
            )
        expected = adapter.num_virtual_tokens * row_size * ITEM_BYTES[adapter.dtype]
        if len(adapter.rows) != expected:
            raise AdapterInvalid(f"the rows are {len(adapter.rows)} bytes, not {expected}", field="tensors")

    def drop_adapter(self, digest: str) -> None:
        """Free an adapter's rows, or a LoRA, at the latest when the last request with it has finished."""
        self._load_errors.pop(digest, None)
        if digest in self._virtual_ids or digest in self._lora_slots:
            self._dropping.add(digest)
            self._drop_unused()

    def _drop_unused(self) -> None:
        for digest in [digest for digest in self._dropping if not self._uses(digest)]:
            self._loading.end(digest)
            self._free(digest)

    def _uses(self, digest: str) -> bool:
        return self._scheduler.uses(digest) or self._compiling.uses(digest) or self._loading.uses(digest)

    def find_nearest(self, command: FindNearest) -> None:
        """Queue a search; it is answered, or refused, by a later step."""
        self._searches[command.search_id] = command

    def abort_search(self, search_id: int) -> None:
        """Forget a search; what it holds on the device is free at once."""
        if search_id == next(iter(self._searches), None):
            self._search = None
        self._searches.pop(search_id, None)

    def _find_embeddings(self, digest: str) -> int:
        """First virtual id of an adapter whose rows are embeddings."""
        if error := self.load_error(digest):
            raise error
        if digest in self._lora_slots or self._virtual_ids.are_key_values(digest):
            raise InvalidArgument(
                "only virtual tokens that are embeddings are near tokens; this adapter is a LoRA, which has none, "
                "or gives keys and values",
                field="adapter",
            )
        if digest not in self._virtual_ids:
            raise AdapterNotFound(f"adapter {digest} is not loaded", field="adapter")
        return self._virtual_ids.ids(digest).start

    def _advance_search(self) -> None:
        """Compute one piece of the oldest search, which alone holds its rows."""
        command = next(iter(self._searches.values()), None)
        if command is None:
            return
        try:
            if self._search is None:
                self._search = self._runner.find_nearest(self._find_embeddings(command.digest), command.top_k)
            rows = self._search.advance()
        except SoftpromptError as error:
            answer = _not_found(command.search_id, error)
        except Exception:
            _log.exception("a search for nearest tokens failed")
            broken = InternalError("the model failed while computing this request")
            answer = _not_found(command.search_id, broken)
        else:
            if rows is None:
                return
            answer = Nearest(search_id=command.search_id, rows=rows)
        self._found.append(answer)
        self.abort_search(command.search_id)

    def step(self) -> StepResult:
        """Compute one step for everybody, and begin the one behind it where that is possible.

        Raises EngineBroken when the model has failed MAX_FAILED_STEPS times in a row.
        """
        self._load_piece()
        if self._compiling:
            self._queue_compiled()
        outputs, self._refused = self._refused, []
        outputs += self._compute()
        self._advance_search()
        found, self._found = self._found, []
        failed_loads, self._failed_loads = self._failed_loads, []
        if self._dropping:
            self._drop_unused()
        resident_adapters = len(self._virtual_ids) + len(self._lora_slots)
        stats = self._scheduler.stats(resident_adapters=resident_adapters)
        return StepResult(outputs=outputs, stats=stats, found=found, failed_loads=failed_loads)

    def _queue_compiled(self) -> None:
        for sequence, matcher in self._compiling.take(wait_s=0.0 if self._has_steps else _COMPILING_WAIT_S):
            request_id = sequence.request.request_id
            try:
                sequence.matcher = matcher.result()
            except SoftpromptError as error:
                self._refused.append(failure(request_id, error))
            except Exception:
                _log.exception("the grammar of request %s could not be compiled", request_id)
                self._refused.append(failure(request_id, InternalError("the grammar could not be compiled")))
            else:
                self._scheduler.add(sequence)

    def _compute(self) -> list[Output]:
        step, self._launched = self._launched, None
        plan = self._scheduler.plan() if step is None else step.plan
        if not plan.chunks:
            return []
        try:
            step = step or self._launch(plan)
            if self._looks_ahead and (following := self._scheduler.follow(plan)):
                self._launched = self._launch(following)
            sampled = step.pending.result()
        except Exception as error:
            _log.exception("a step of %d sequences failed", len(plan.chunks))
            self._launched = None
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise EngineBroken(f"the model failed in {self._failed_steps} steps in a row") from error
            return self._scheduler.fail_planned(InternalError("the model failed while computing this request"))
        except BaseException:  # Ctrl-C: who called may go on with other requests
            self._launched = None
            self._scheduler.fail_planned(InternalError("the step was interrupted"))
            raise
        self._failed_steps = 0
        return self._scheduler.commit(plan, sampled)

    def _launch(self, plan: StepPlan) -> _Launched:
        return _Launched(plan=plan, pending=self._runner.launch(plan))

    def check(self) -> None:
        """Verify all invariants; AssertionError on any disagreement."""
        self._scheduler.check()
        self._lora_slots.check()
        assert all(digest in self._virtual_ids or digest in self._lora_slots for digest in self._dropping)


def _not_found(search_id: int, error: SoftpromptError) -> Nearest:
    """The answer to a search that could not be made."""
    return Nearest(
        search_id=search_id, error_reason=error.reason, error_message=error.message, error_field=error.field
    )
