"""A causal language model of transformers: hidden states of decisions, and the head. Axes: `retort.core`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from retort.align.images import ImageTokens
from retort.align.stops import StopTokens
from retort.core.head import Head
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models import forward
from retort.models.adapter import Adapter
from retort.models.batches import token_batches
from retort.models.digests import sample_digest, whole_digest
from retort.models.heads import head_of, own_rows
from retort.models.images import ImageProcessing
from retort.models.offload import Offload
from retort.models.quantized import count
from retort.models.sharding import Sharding
from retort.models.vision import Vision, tower_of
from retort.models.working import WorkingCopy
from retort.ranks import World

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["bf16", "fp32"]


def best_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that multiplies in it, fp32 elsewhere: on the CPUs measured bf16 makes no step shorter.

    The rule is fixed, so that runs repeat. On a GPU a pair may need another, see `retort.train.models.precision`.
    """
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


@dataclass(eq=False)
class LanguageModel:
    """A causal language model with its tokenizer and stop tokens.

    Attributes:
        model: The model of transformers. A student's weights are fp32; a teacher's are in its compute precision.
        tokenizer: Its tokenizer.
        stops: Tokens that end its completions.
        name: Path or hub name, for messages.
        precision: The precision of products.
        saved_generation: The generation settings to save beside the model (decoding here ignores them).
        packs: Whether sequences are scored end to end in one row, see `retort.models.packing`; else they are padded.
        shared_prefixes: Whether sequences with the same prompt share it in a packed row.
        together_up_to: Longest sequence, tokens, that may be computed with others; longer ones are computed alone.
            None: any may.
        rereads_from: Length, tokens, beyond which the model computes all earlier tokens differently; None: never.
        tried: Lengths in its settings beyond which all of that was tried.
        trials: What trials of generating with it have shown, by name and arithmetic, so that none is made twice.
        adapter: The adapter of a student that learns by one; it is inside the model, see `retort.models.adapter`.
        working: The weights in bf16 for computations without gradient; shared by all models that share the weights.
        sharding, offload: How the weights are spread over several ranks, and when they are here; shared likewise.
        notes: Notes for the user.
        rounded: How its weights were rounded, in words; empty where they were not.
        image_tokens, vision: How images are written into its prompts, and how it reads them; None for text alone.
    """

    here: ClassVar[bool] = True  # whether its weights are in this process
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: StopTokens
    name: str
    precision: Precision
    saved_generation: GenerationConfig
    packs: bool = False
    shared_prefixes: bool = False
    together_up_to: int | None = None
    rereads_from: int | None = None
    tried: list[int] = field(default_factory=lambda: [])
    trials: dict[str, bool] = field(default_factory=lambda: {})
    adapter: Adapter | None = None
    working: WorkingCopy = field(default_factory=WorkingCopy)
    sharding: Sharding = field(default_factory=Sharding)
    offload: Offload = field(default_factory=Offload)
    notes: list[str] = field(default_factory=lambda: [])
    rounded: str = ""
    image_tokens: ImageTokens | None = None
    vision: Vision | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights, also while they are away."""
        return self.offload.device or self.model.device

    @property
    def parameters(self) -> int:
        """Number of its parameters, tied ones counted once, without an adapter's."""
        return sum(count(parameter) for parameter in self.weights().values())

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that learn: all of its own, or those of an adapter."""
        return sum(parameter.numel() for parameter in self.trainable().values())

    def trainable(self) -> dict[str, Parameter]:
        """Parameters that learn, by name: all of a full student, an adapter's tensors, none of a frozen model.

        Optimizer, checkpoints and averages of weights use them in this order.
        """
        if self.adapter is not None:
            return dict(self.adapter.tensors)
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def weights(self) -> dict[str, Parameter]:
        """The model's own parameters without an adapter's, by the names of the model's folder."""
        named = self.model.named_parameters()
        if self.adapter is None:
            return dict(named)
        return {own: parameter for name, parameter in named if (own := self.adapter.own_name(name)) is not None}

    @property
    def context(self) -> int:
        """The longest sequence it takes, tokens."""
        text_config = self.model.config.get_text_config()
        return int(getattr(text_config, "max_position_embeddings", None) or 2**31)

    @property
    def rows(self) -> int:
        """Number of ids that it can read: rows of its embedding."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return self.head().width if weight is None else int(weight.shape[0])

    def digest(self) -> str:
        """A fingerprint of the weights: their names and shapes, and a sample of each."""
        with self.offload.present():
            return sample_digest(self)

    def whole_digest(self) -> str:
        """A fingerprint of every byte of the weights; about a second per gigabyte."""
        with self.offload.present():
            return whole_digest(self)

    @property
    def arithmetic(self) -> str:
        """How its hidden states are computed besides weights and configuration: in which precision and attention."""
        return f"{self.precision} {self.model.config._attn_implementation}"

    def head(self) -> Head:
        """The output head, with the scale or soft-cap that the family applies to its logits."""
        found = self.kept_head()
        return found.each(self.sharding.part) if self.sharding.on else found

    def kept_head(self) -> Head:
        """The head as the model holds it: of several ranks not gathered, for its shape, and whether it learns."""
        return head_of(self.model, self.adapter)

    def own_head(self) -> Head:
        """Of the head, the rows that this rank keeps: neighbouring ids, see `retort.models.sharding.bounds`."""
        return own_rows(self.kept_head(), self.sharding.part)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every rank holds all weights, for passes without gradient; all ranks enter it together."""
        with self.offload.kept(), self.sharding.whole():
            try:
                yield
            finally:
                if self.sharding.on:
                    self.working.drop()  # copies of tensors that are about to be freed

    @contextlib.contextmanager
    def whole_state(self) -> Iterator[dict[str, Tensor] | None]:
        """Within, the model's whole state by name where it is spread, else None; all ranks enter it together."""
        if not self.sharding.on:
            yield None
            return
        with self.sharding.whole_state(self.model) as state:
            yield state

    def spread(self, world: World) -> None:
        """Spreads the weights over ranks, each of which keeps a slice; whoever holds parameters asks for them anew.

        Raises:
            UserError: A family that cannot be spread.
        """
        self.sharding.spread(self.model, world, self.name, tower_of(self.vision))
        if self.adapter is not None:
            self.adapter.tensors = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with self.whole(), torch.no_grad(), self.compute():  # a first pass, which also settles who is whose parent
            self._probe()

    def spread_layers(self, world: World) -> None:
        """Spreads the layers of a frozen model over ranks; one that shares the student's weights is spread already.

        Raises:
            UserError: A family whose layers cannot be spread.
        """
        if world.size == 1 or self.sharding.on:
            return
        self.sharding.spread_layers(self.model, world, self.name, tower_of(self.vision))
        with torch.no_grad():  # a first pass outside of inference mode, whose tensors could not be written to later
            self._probe()

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        """Within, `all_hidden` may be called on every rank, equally often; all ranks enter it together.

        With whole weights on every rank, except where a frozen model's layers are spread: these are gathered one by
        one, so that no rank ever holds all of them.
        """
        return contextlib.nullcontext() if self.sharding.in_step else self.whole()

    def no_steps(self) -> Tensor:
        """Hidden states of no step, [0, D], behind which lies a pass like any other, to keep step with other ranks."""
        with self.compute():
            return self._one_token()[0, :0]

    def idle(self) -> None:
        """A forward and backward pass that adds nothing to any gradient, to keep step with ranks that have one more."""
        with self.compute():
            hidden_11D = self._one_token()
            parts = [part for part in self.head().parts if part is not None]
        nothing = torch.stack([x.sum() for x in (hidden_11D, *parts)]).sum() * 0.0
        if nothing.requires_grad:
            nothing.backward()

    def save_tokens(self, folder: Path) -> None:
        """Saves the tokenizer, and the processor of a model that reads images, beside a model."""
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.image_tokens, ImageProcessing):
            self.image_tokens.save(folder)

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Restores, for the block, the model before it learnt: a frozen teacher that takes no memory.

        A loss must be computed and differentiated on the same side of it.

        Raises:
            UserError: There is no adapter.
        """
        if self.adapter is None:
            raise UserError(f"{self.name} learns without an adapter, so it cannot be used as it was before (lora.rank)")
        with self.adapter.off():
            yield

    def bare(self) -> LanguageModel:
        """The same model without its adapter, to be used as any other frozen model; it shares all weights.

        Raises:
            UserError: As `without_adapter`.
        """
        with self.without_adapter():
            return _Bare(**{field.name: getattr(self, field.name) for field in fields(self)})

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        """Computes products in the model's precision for the block; master weights stay as they are.

        Where no gradient is wanted, layers (and a `head` that is read inside) hold copies that are already cast.
        """
        narrow = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow):
            if not narrow or self.model.dtype != torch.float32 or self.sharding.by_layer:
                yield
            elif torch.is_grad_enabled():
                self.working.drop(frozen=False)  # learning needs the memory, and casts the weights itself
                yield
            else:
                with self.working.in_place(self.model, self._probe):
                    yield

    def _one_token(self) -> Tensor:
        """The last hidden state of the shortest pass, [1, 1, D]."""
        ids_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.model.base_model(input_ids=ids_11, use_cache=False).last_hidden_state

    def _probe(self) -> Tensor:
        """Hidden states and logits of a few tokens, in which all weights take part."""
        ids_RL = (torch.arange(16, device=self.device)[None] * 7 + 1) % self.rows
        hidden_RLD = self.model.base_model(input_ids=ids_RL, use_cache=False).last_hidden_state
        found = torch.cat([hidden_RLD.float(), self.head().logits(hidden_RLD).float()], dim=-1).flatten()
        return found if self.vision is None else torch.cat([found, self.vision.probe()])

    @torch.no_grad()
    def working_bytes(self) -> tuple[int, int]:
        """Bytes of the copies of the weights where products are in bf16: of learning and of frozen weights."""
        if self.precision != "bf16" or self.model.dtype != torch.float32:
            return 0, 0
        with self.compute():
            pass  # only finds the copies; where ranks share the weights, `spread` has found them
        return self.working.bytes()

    def hidden(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Hidden states [N, D] from which the decided tokens of these sequences were (or would be) sampled, in order.

        Raises:
            UserError: An id for which the model has no row, or media, which it cannot read.
        """
        self.check_readable(sequences)
        limit = self.together_up_to
        if limit is not None and any(len(sequence) > limit for sequence in sequences):
            return self.alone(sequences)
        if self.vision is not None and not self.vision.joins and any(sequence.media for sequence in sequences):
            return self.alone(sequences)
        return self.packed(sequences) if self.packs else self.padded(sequences)

    def check_readable(self, sequences: Iterable[TokenSequence], where: str = "a text") -> None:
        """Raises `UserError` if the model cannot read one of these; `where` names them."""
        sequences = list(sequences)
        self.check_media(sequences, where)
        self.check_ids((int(sequence.tokens_L.max()) for sequence in sequences if len(sequence)), where)

    def check_media(self, sequences: Iterable[TokenSequence], where: str) -> None:
        """Raises `UserError` if one of these holds media that the model does not read; `where` names them."""
        found = [sequence for sequence in sequences if sequence.media]
        if found and isinstance(self.image_tokens, ImageProcessing):
            self.image_tokens.check(found, where)
        elif found:
            raise UserError(
                f"{where} holds an image, a sound or a video, and {self.name} is read as a model of text alone; "
                "leave that out of the data"
            )

    def check_ids(self, ids: Iterable[int], where: str = "a text") -> None:
        """Raises `UserError` if the model has no row for one of these ids; `where` names their source."""
        rows = self.rows
        for token in ids:
            if token >= rows:
                raise UserError(
                    f"{where} holds {self.tokenizer.convert_ids_to_tokens(token)!r} (id {token}), for which "
                    f"{self.name} has no row: its embeddings have {rows}; resize them to its tokenizer, or leave out "
                    "that token"
                )

    def alone(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The same, every sequence alone and no longer than its last decision needs: the definition."""
        return forward.alone(self, sequences)

    def padded(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The same, in rows of equal length."""
        return forward.padded(self, sequences)

    def packed(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The same, end to end in one row."""
        return forward.packed(self, sequences)

    def batches(self, sequences: Sequence[TokenSequence], budget: int) -> list[list[int]]:
        """Indices of sequences, cut into batches for which at most `budget` tokens are computed (or one sequence)."""
        limit = self.together_up_to
        if limit is not None and any(len(sequence) > limit for sequence in sequences):
            short = [i for i, sequence in enumerate(sequences) if len(sequence) <= limit]
            batches = self.batches([sequences[i] for i in short], budget)
            long = [[i] for i, sequence in enumerate(sequences) if len(sequence) > limit]
            return [[short[i] for i in batch] for batch in batches] + long
        if not self.packs:
            return token_batches([len(sequence) for sequence in sequences], budget)
        from retort.models.packing import row_batches  # loads transformers

        return row_batches(sequences, budget, share=self.shared_prefixes)

    def all_hidden(self, sequences: Sequence[TokenSequence], budget: int) -> Tensor:
        """The same for any number of sequences, without gradient, in batches of at most `budget` tokens."""
        parts: dict[int, Tensor] = {}
        batches = self.batches(sequences, budget) if sequences else []
        spare = self.sharding.spare(len(batches))
        with torch.inference_mode(), self.offload.kept():
            for batch in batches:
                own = [sequences[i] for i in batch]
                hidden_ND = self.hidden(own)
                parts.update(zip(batch, hidden_ND.split([sequence.steps for sequence in own]), strict=True))
            for _ in range(spare):
                with self.compute():
                    self._one_token()
        # Outside of inference mode, so that the result is an ordinary tensor, which autograd may save.
        with torch.no_grad():
            if not sequences:
                weight_VD = self.head().weight_VD
                return weight_VD.new_zeros(0, weight_VD.shape[1])
            return torch.cat([parts[index] for index in range(len(sequences))])


class _Bare(LanguageModel):
    """A model with its adapter switched off whenever it computes."""

    def trainable(self) -> dict[str, Parameter]:
        return {}

    def head(self) -> Head:
        with self.without_adapter():
            return super().head()

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        with self.without_adapter(), super().compute():
            yield
