"""The CPU's fast way through a decoder of a known family: packed products, fused kernels between them.

Replaces, layer by layer, what the transformers modules compute: [add + norm] -> [q, k, v product] -> [q/k norm, rotary,
KV write] -> attention -> [o product] -> [add + norm] -> [gate, up product] -> [SwiGLU] -> [down product]. Every layer
is compared with the module that it replaces on random input before that module's weights are freed; a difference
beyond rounding refuses the fusion. Rotary tables come from the model's own module, so every static scaling works.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from engine.attention.base import AttentionBackend
from engine.attention.transformers_door import Step
from engine.forward import ForwardBatch, SequenceChunk, build_batch
from engine.kernels.elementwise import add_rms_norm, rotary_to_pool, swiglu
from engine.kernels.team import Kernel
from engine.linear import PackedLinear
from engine.pool import KvPool

_KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest value, for one layer


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the layers of `model` are built of the parts that are computed here."""
    return (
        type(model).__name__ in _KNOWN
        and model.config.hidden_act in ("silu", "swish")
        and model.dtype in _TOLERANCE
        and model.device.type == "cpu"
    )


class FusionMismatch(Exception):
    """A fused layer does not compute what its module computes."""

    def __init__(self, layer_idx: int, problem: str) -> None:
        super().__init__(f"layer {layer_idx}: {problem}")
        self.layer_idx = layer_idx


class FusedLayer:
    """One decoder layer. `forward` of the whole is in `FusedDecoder`."""

    def __init__(self, module: Any, layer_idx: int) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.layer_idx = layer_idx
        self.input_norm = module.input_layernorm.weight.detach()
        self.output_norm = module.post_attention_layernorm.weight.detach()
        self.qkv = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = PackedLinear([attention.o_proj])
        self.gate_up = PackedLinear([mlp.gate_proj, mlp.up_proj])
        self.down = PackedLinear([mlp.down_proj])
        self.query_norm, self.key_norm, self.head_eps = None, None, 0.0
        if hasattr(attention, "q_norm"):
            self.query_norm = attention.q_norm.weight.detach()
            self.key_norm = attention.k_norm.weight.detach()
            self.head_eps = float(attention.q_norm.variance_epsilon)
        self.scaling = float(attention.scaling)
        window = getattr(attention, "sliding_window", None)
        if module.self_attn.config.model_type == "mistral":  # every layer alike, read at call time there
            window = getattr(attention.config, "sliding_window", None)
        self.window = int(window or 0)


class FusedDecoder:
    """A whole model: token ids in, float32 logits out.

    Concurrency: one forward at a time.
    """

    def __init__(self, model: PreTrainedModel, pool: KvPool, backend: AttentionBackend, max_positions: int) -> None:
        """Take the weights out of `model`, whose layers are gone afterwards.

        Args:
            max_positions: length of the rotary tables.
        Raises:
            FusionMismatch: nothing was freed if the first layer differs; `model` is broken if a later one does.
        """
        decoder = model.model
        self._pool, self._backend = pool, backend
        self._threads = torch.get_num_threads()
        self._num_heads = int(model.config.num_attention_heads)
        self._eps = float(decoder.norm.variance_epsilon)
        self._norm = Kernel(*add_rms_norm(pool.layout.dtype))
        self._rotary = Kernel(*rotary_to_pool(pool.layout.dtype))
        self._swiglu = Kernel(*swiglu(pool.layout.dtype))
        self._cosines, self._sines = _rotary_tables(model, max_positions)
        self._embedding = decoder.embed_tokens.weight.detach()
        self._final_norm = decoder.norm.weight.detach()
        self._layers: list[FusedLayer] = []
        for layer_idx in range(pool.layout.num_layers):
            layer = FusedLayer(decoder.layers[layer_idx], layer_idx)
            self._compare(model, layer)
            self._layers.append(layer)
            decoder.layers[layer_idx] = torch.nn.Identity()
        self._head = PackedLinear([model.lm_head])

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None) -> torch.Tensor:
        """Return float32 logits [R, V]; K and V of the batch are in the pool."""
        self._threads = torch.get_num_threads()  # of this step
        hidden = embedding(batch.token_ids, self._embedding)
        normed = torch.empty_like(hidden)
        self._add_norm(hidden, None, self._layers[0].input_norm, normed)
        plan = self._backend.plan(batch)
        last = len(self._layers) - 1
        for layer in self._layers:
            query = self._keys_to_pool(layer, normed, batch)
            if on_layer is not None:
                on_layer(layer.layer_idx)
            if batch.window_rows.shape[0]:
                batch.window_queries.append(query[batch.window_rows])
            is_scored = batch.scored_rows.shape[0] > 0
            if layer.layer_idx == last and not is_scored and batch.logits_rows.shape[0] < batch.num_tokens:
                # From here on only rows whose logits are wanted matter.
                if not batch.logits_rows.shape[0]:
                    break
                hidden, query = hidden[batch.logits_rows], query[batch.logits_rows]
                normed = torch.empty_like(hidden)
                plan = self._backend.plan(batch.only_logits())
            next_norm = self._final_norm if layer.layer_idx == last else self._layers[layer.layer_idx + 1].input_norm
            self._after_keys(layer, hidden, query, plan, next_norm, normed)
        if batch.scored_rows.shape[0]:
            batch.scored_states.append(normed[batch.scored_rows])
            normed = normed[batch.logits_rows]
        if not batch.logits_rows.shape[0]:
            return torch.empty((0, self._embedding.shape[0]), dtype=torch.float32)
        return self._head(normed).float()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, V] of hidden states [R, hidden size] after the final norm."""
        return self._head(states).float()

    def _add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        rows, width = hidden.shape
        self._norm.run(
            self._threads_for(rows * width),
            hidden.data_ptr(),
            0 if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            self._eps,
        )

    def _keys_to_pool(self, layer: FusedLayer, normed: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Project, rotate, write K and V; return the queries [T, H, D], strided."""
        qkv = layer.qkv(normed)
        layout, kv = self._pool.layout, self._pool.kv
        self._rotary.run(
            self._threads_for(qkv.numel()),
            qkv.data_ptr(),
            qkv.shape[0],
            self._num_heads,
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_size,
            kv.stride(0),
            batch.positions.data_ptr(),
            batch.slot_mapping.data_ptr(),
            self._cosines.data_ptr(),
            self._sines.data_ptr(),
            kv.data_ptr() + layer.layer_idx * kv.stride(1) * kv.element_size(),
            0 if layer.query_norm is None else layer.query_norm.data_ptr(),
            0 if layer.key_norm is None else layer.key_norm.data_ptr(),
            layer.head_eps,
        )
        size = self._num_heads * layout.head_dim
        return qkv[:, :size].view(-1, self._num_heads, layout.head_dim)

    def _after_keys(
        self,
        layer: FusedLayer,
        hidden: torch.Tensor,
        query: torch.Tensor,
        plan: Any,
        next_norm: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        """Attention and MLP: updates `hidden` in place, leaves its norm under `next_norm` in `normed`."""
        attended = self._backend.attend(query, layer.layer_idx, plan, scaling=layer.scaling, window=layer.window)
        self._add_norm(hidden, layer.output(attended), layer.output_norm, normed)
        gate_up = layer.gate_up(normed)
        width = gate_up.shape[1] // 2
        activated = torch.empty((gate_up.shape[0], width), dtype=gate_up.dtype)
        self._swiglu.run(
            self._threads_for(gate_up.numel()), gate_up.data_ptr(), activated.data_ptr(), gate_up.shape[0], width
        )
        self._add_norm(hidden, layer.down(activated), next_norm, normed)

    def _threads_for(self, num_elements: int) -> int:
        return self._threads if num_elements > _ALONE_ELEMENTS else 1

    def _compare(self, model: PreTrainedModel, layer: FusedLayer) -> None:
        """Run `layer` and its module on the same random input, with an own tiny pool.

        Raises:
            FusionMismatch: hidden states or keys and values differ beyond rounding.
        """
        pool, backend = self._pool, self._backend
        size = pool.layout.block_size
        blocks = range(min(2, pool.num_blocks))
        batch = build_batch([SequenceChunk([0] * min(size, 6), 0, [block]) for block in blocks], size)
        generator = torch.Generator().manual_seed(layer.layer_idx)
        hidden = torch.randn((batch.num_tokens, self._embedding.shape[1]), generator=generator).to(model.dtype)
        touched = pool.kv[: len(blocks), layer.layer_idx]
        step = Step(batch, pool, backend, backend.plan(batch))
        module: Any = model.model.layers[layer.layer_idx]
        rotary = model.model.rotary_emb(hidden[None], position_ids=batch.positions[None])
        expected = module(hidden[None], position_embeddings=rotary, position_ids=batch.positions[None], step=step)[0]
        expected_kv = touched.clone()
        touched.zero_()
        own, normed = hidden.clone(), torch.empty_like(hidden)
        self._add_norm(own, None, layer.input_norm, normed)
        query = self._keys_to_pool(layer, normed, batch)
        identity = torch.zeros_like(layer.input_norm)
        self._after_keys(layer, own, query, step.plan, identity, normed)
        try:
            _check_close(
                model.dtype,
                layer.layer_idx,
                ("hidden states", own, expected),
                ("keys and values", touched, expected_kv),
            )
        finally:
            touched.zero_()


def _check_close(dtype: torch.dtype, layer_idx: int, *parts: tuple[str, torch.Tensor, torch.Tensor]) -> None:
    """
    Raises:
        FusionMismatch: the tensors of a part differ beyond rounding.
    """
    for name, ours, theirs in parts:
        limit = _TOLERANCE[dtype] * theirs.float().abs().max().item()
        difference = (ours.float() - theirs.float()).abs().max().item()
        if not difference <= limit:
            raise FusionMismatch(layer_idx, f"{name} differ by {difference:.3g}, limit {limit:.3g}")


_ALONE_ELEMENTS = 32_768  # below, waking the other threads costs more than they save


def _rotary_tables(model: PreTrainedModel, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 [positions, D / 2], rounded as the model rounds them."""
    positions = torch.arange(max_positions)[None]
    cosines, sines = model.model.rotary_emb(torch.empty(1, 1, 1, dtype=model.dtype), position_ids=positions)
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()
