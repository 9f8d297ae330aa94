"""The connector: the scheduler's side knows requests, the worker's side has their states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from h5traces.errors import OptionError
from h5traces.format.dtypes import TypedArray
from h5traces.vllm.provenance import described, sampling_of
from h5traces.vllm.recorder import (
    KEY,
    Finished,
    Handover,
    Recorder,
    Settings,
    asked_for,
    slots_of,
)

_CACHE = "cache_only_layers."


@dataclass
class _Ended(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types here
    """Requests that ended since the last step."""

    requests: list[Finished] = field(default_factory=list)


class H5TracesConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Stores hidden states of every request that ends; needs method ``extract_hidden_states``.

    Made once for the scheduler and once for every worker; rank 0 of a tensor-parallel group writes.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        speculative = vllm_config.speculative_config
        if speculative is None or speculative.method != "extract_hidden_states":
            message = (
                "H5TracesConnector needs the speculative method extract_hidden_states; see "
                "docs/vllm.md"
            )
            raise OptionError(message)
        # Steps with a longer sequence leave what the cache held before in place of states.
        shorter = speculative.draft_model_config.max_model_len
        if shorter is not None and shorter < vllm_config.model_config.max_model_len:
            message = (
                f"speculative_config has max_model_len {shorter}, and the engine "
                f"{vllm_config.model_config.max_model_len}: vLLM keeps no states of longer "
                "sequences; leave it out"
            )
            raise OptionError(message)
        ids = speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids
        self._num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        self._slots = slots_of(list(ids), self._num_layers, self._settings.layers)
        self._num_slots = len(ids)
        self._group = ExampleHiddenStatesConnector._find_cache_kv_group_id(kv_cache_config)
        self._ended: list[Finished] = []
        self._recorder: Recorder | Handover | None = None
        self._cache: torch.Tensor | None = None

    # --- the scheduler's side ---

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """Nothing is loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> Any:
        """Keep the blocks of a request until its states are copied."""
        if self._group >= len(block_ids):
            return False, None
        return self.request_finished(request, block_ids[self._group])

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        """Note a request; the response says under which id it will be stored, or why not."""
        every = list(request.all_token_ids)
        # The last token was chosen, but is not an input.
        count = min(len(every) - 1, request.num_computed_tokens)
        if count < 1 or not block_ids:
            return False, {KEY: {"error": "not stored: vLLM kept no states of it"}}
        try:
            sample_id, fields = asked_for(request.kv_transfer_params)
        except OptionError as error:
            return False, {KEY: {"error": f"not stored: {error}"}}
        if self._settings.handover is not None and sample_id is None:
            return False, None
        reason = request.get_finished_reason()
        found = Finished(
            request_id=request.request_id,
            tokens=tuple(every[:count]),
            prompt_len=request.num_prompt_tokens,
            output_ids=tuple(request.output_token_ids),
            finish_reason="unknown" if reason is None else str(reason),
            block_ids=tuple(block_ids),
            sample_id=sample_id,
            fields=fields,
            sampling=sampling_of(request.sampling_params),
        )
        self._ended.append(found)
        return True, {KEY: {"sample_id": sample_id or request.request_id}}

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Hand the requests that ended to the workers."""
        ended, self._ended = self._ended, []
        return _Ended(ended)

    def get_finished_count(self) -> int:
        """One worker of a group stores, and reports."""
        return 1

    # --- the worker's side ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the cache of hidden states, ``(blocks, slots, block size, hidden)``."""
        if get_tensor_model_parallel_rank() != 0:
            return
        found = [cache for name, cache in kv_caches.items() if _CACHE in name]
        if len(found) != 1 or found[0].ndim != 4 or found[0].shape[1] != self._num_slots:
            shapes = {name: tuple(each.shape) for name, each in kv_caches.items() if _CACHE in name}
            message = (
                f"vLLM has caches of hidden states {shapes}, expected one of shape (blocks, "
                f"{self._num_slots}, block size, hidden); this version of vLLM is not supported"
            )
            raise OptionError(message)
        self._cache = found[0]
        if self._settings.handover is not None:
            self._recorder = Handover(self._settings.handover)
            return
        config = self._vllm_config
        blocks = [each for each in self._slots.values() if each is not None]
        self._recorder = Recorder.of(
            self._settings,
            config.parallel_config.data_parallel_index,
            model_id=config.model_config.model,
            model_revision=config.model_config.revision,
            num_layers=self._num_layers,
            extraction=described(config, blocks),
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """States are taken when a request ends."""

    def wait_for_save(self) -> None:
        """States are taken when a request ends."""

    def get_finished(self, finished_req_ids: set[str]) -> Any:
        """Copy the states of requests that ended; their blocks are free then."""
        if self._recorder is None or self._cache is None or not self.has_connector_metadata():
            return None, None
        ended = self._get_connector_metadata()
        for request in ended.requests:
            self._recorder.take(request, self._states(request), self._slots)
        return {each.request_id for each in ended.requests} or None, None

    def _states(self, request: Finished) -> TypedArray:
        assert self._cache is not None
        size = self._cache.shape[2]
        positions = torch.arange(len(request.tokens), device=self._cache.device)
        blocks = torch.tensor(request.block_ids, device=self._cache.device)[positions // size]
        # A copy, since the blocks will be used again.
        found = self._cache[blocks, :, positions % size].cpu()
        if found.dtype == torch.bfloat16:
            return TypedArray(found.view(torch.uint16).numpy(), "bfloat16")
        return TypedArray.of(found.numpy())

    def shutdown(self) -> None:
        """Write what waits. A killed worker does not get here: its spool has what was stored."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str:
        """Hidden states of a token lie together."""
        return "LBNHC"
