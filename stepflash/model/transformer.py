"""Step-3.5: the trunk, its head and its prediction modules; one definition for serving, training and RL.

Everything is token-flat: `hidden_states` is [num_tokens, hidden_size], whatever number of sequences the tokens
belong to. Which tokens see which is decided by the `attend` argument alone. `state_dict` keys are the names of
the released checkpoint.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from stepflash.model.attention import Attend, PackedAttention
from stepflash.model.block import DecoderLayer
from stepflash.model.config import ModelConfig, RopeConfig
from stepflash.model.layers import Linear, RMSNorm
from stepflash.model.moe import Route
from stepflash.model.mtp import MTPLayer
from stepflash.model.rope import Rotation, inverse_frequencies, rotation


class Trunk(nn.Module):
    """Embedding, all layers (the MTP modules follow the trunk's, as in the checkpoint) and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (DecoderLayer if i < config.num_layers else MTPLayer)(config, i)
            for i in range(len(config.layers))
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Step3p5ForCausalLM(nn.Module):
    """The network. Parameters are left uninitialised: a loader or a trainer fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        # Rotary frequencies by layer kind; a GGUF's own table may replace an entry.
        self.rope_frequencies: dict[RopeConfig, Tensor] = {
            layer.rope: inverse_frequencies(layer.rope) for layer in config.layers
        }
        # Kinds in the trunk, and which of them each layer is: a step must not hash configurations.
        self._trunk_ropes = tuple(dict.fromkeys(layer.rope for layer in config.trunk_layers))
        self._rope_kinds = tuple(self._trunk_ropes.index(layer.rope) for layer in config.trunk_layers)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, route: Route | None = None
    ) -> Tensor:
        """Run the trunk.

        Args:
            input_ids, positions: [num_tokens] int64; a position counts from the start of its sequence.
            attend: what the tokens see, see `stepflash.model.attention`.
            route: watches or replaces the choice of experts.
        Returns:
            hidden_states [num_tokens, hidden_size], before the final norm (what MTP module 1 reads).
        """
        hidden_states: Tensor = self.model.embed_tokens(input_ids)
        rotations = [self.rotation(rope, positions) for rope in self._trunk_ropes]
        for layer, kind in zip(self.trunk_layers(), self._rope_kinds, strict=True):
            hidden_states = layer(hidden_states, rotations[kind], attend, route)
        return hidden_states

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, vocab_size] float32."""
        logits: Tensor = self.lm_head(self.model.norm(hidden_states))
        return logits.float()

    def mtp_forward(
        self, module: int, input_ids: Tensor, hidden_states: Tensor, positions: Tensor, attend: Attend
    ) -> Tensor:
        """Run MTP module `module` (1, 2 or 3).

        Args:
            input_ids: [num_tokens]; at position p the token p + module.
            hidden_states: [num_tokens, hidden_size]; at position p what module - 1 left there (0: the trunk).
            positions: [num_tokens], of the hidden states.
        Returns:
            hidden_states [num_tokens, hidden_size] for module + 1, before this module's final norm.
        """
        layer = self.mtp_layer(module)
        embeddings = self.model.embed_tokens(input_ids)
        rotation_ = self.rotation(layer.rope, positions)
        return layer.combine(embeddings, hidden_states, rotation_, attend)

    def mtp_compute_logits(self, module: int, hidden_states: Tensor) -> Tensor:
        """[num_tokens, hidden_size] of that module -> [num_tokens, vocab_size] float32."""
        return self.mtp_layer(module).compute_logits(hidden_states).float()

    def trunk_layers(self) -> list[DecoderLayer]:
        # NOTE: slicing a ModuleList would build a new one in every step.
        first = islice(self.model.layers, self.config.num_layers)
        return [layer for layer in first if isinstance(layer, DecoderLayer)]

    def mtp_layer(self, module: int) -> MTPLayer:
        if not 1 <= module <= self.config.num_mtp_layers:
            raise ValueError(f"no MTP module {module}: the checkpoint has {self.config.num_mtp_layers}")
        layer = self.model.layers[self.config.num_layers + module - 1]
        assert isinstance(layer, MTPLayer)
        return layer

    def rotation(self, rope: RopeConfig, positions: Tensor) -> Rotation:
        frequencies = self.rope_frequencies[rope]
        if frequencies.device != positions.device:
            # Kept where they are needed: a step must not wait for the host.
            with torch.inference_mode(False):
                frequencies = self.rope_frequencies[rope] = frequencies.to(positions.device)
        return rotation(frequencies, positions)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits of one document after each of its tokens: [num_tokens] -> [num_tokens, vocab_size] float32."""
        positions, attend = self._one_document(input_ids)
        return self.compute_logits(self(input_ids, positions, attend))

    @torch.inference_mode()
    def mtp_logits(self, input_ids: Tensor) -> Tensor:
        """What the MTP modules predict on one document: [num_mtp_layers, num_tokens, vocab_size] float32.

        Entry k - 1 at position p is module k's prediction of token p + k + 1. It reads token p + k, so the last
        k positions of module k are NaN.
        """
        positions, attend = self._one_document(input_ids)
        hidden_states = self(input_ids, positions, attend)
        num_tokens = input_ids.shape[0]
        logits = torch.full((self.config.num_mtp_layers, num_tokens, self.config.vocab_size), float("nan"))
        for module in range(1, min(self.config.num_mtp_layers, num_tokens - 1) + 1):
            known = num_tokens - module
            _, attend = self._one_document(input_ids[:known])
            hidden_states = self.mtp_forward(
                module, input_ids[module:], hidden_states[:known], positions[:known], attend
            )
            logits[module - 1, :known] = self.mtp_compute_logits(module, hidden_states).cpu()
        return logits.to(input_ids.device)

    def _one_document(self, input_ids: Tensor) -> tuple[Tensor, PackedAttention]:
        if input_ids.ndim != 1 or not input_ids.shape[0]:
            raise ValueError(
                f"input_ids must be [num_tokens] with at least one token, got {list(input_ids.shape)}"
            )
        positions = torch.arange(input_ids.shape[0], device=input_ids.device)
        return positions, PackedAttention(self.config.layers, (0, input_ids.shape[0]), input_ids.device)
