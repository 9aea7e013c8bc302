"""How a model of transformers reads images: features computed once for each image, put where its tokens stand.

The definition is the model's own forward, with one sequence and everything that its processor gives (`own_inputs`).
The fast way (`joined`) computes the features of every distinct image of a batch once, and gives them to the same
forward. So families keep their own ways: where features go, in which layers, and how positions count. Whether the two
agree is tried when a model is loaded (`retort.models.together`), not known by a list of names. Axes: `retort.core`; T
is the tokens of a row, or of an image.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from retort.core.images import PromptImage
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.models.images import KEPT_NUMBERS, Bounded, ImageProcessing, made_up

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

#: Settings of a family that name a token in whose place features are put.
_MARKS = re.compile(r"(image|video|audio)_token_(id|index)")
#: Kinds of images, by the shapes of what the processor makes of them, whose features are counted before a run.
_COUNTED = 8


@dataclass(frozen=True)
class Placed:
    """An image in a batch of rows: the row, the index of its first token there, and the image."""

    row: int
    position: int
    media: Media


@dataclass(frozen=True, eq=False)
class Features:
    """What the vision tower makes of an image.

    Attributes:
        pooled_TD: A vector for each of its placeholder tokens.
        deeper: Further vectors that later layers add, [T, D] for each of these layers; empty in most families.
    """

    pooled_TD: Tensor
    deeper: tuple[Tensor, ...] = ()

    @property
    def numbers(self) -> int:
        """How many numbers that is."""
        return sum(part.numel() for part in (self.pooled_TD, *self.deeper))


class Vision:
    """The images of a model.

    Attributes:
        model: Of transformers.
        processing: Its processor.
        joins: Whether images may be read by `joined`; else every sequence is read alone by the model's own forward.
        encoded: Number of images that the tower has computed.
    """

    def __init__(self, model: Any, processing: ImageProcessing) -> None:
        """Wraps a model and its processor.

        Raises:
            UserError: The model does not say in whose place it puts features.
        """
        self.model, self.processing = model, processing
        config = model.config
        mark = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        if not isinstance(mark, int):
            raise UserError(
                f"{processing.name}: its config.json names no image_token_id, so Retort cannot tell which tokens stand "
                "for an image; please open an issue that names this family"
            )
        self.mark = mark
        self.marks = {own for name, own in vars(config).items() if _MARKS.fullmatch(name) and isinstance(own, int)}
        self.marks.add(mark)
        self.joins = False
        self.encoded = 0
        self._features = Bounded(KEPT_NUMBERS, lambda own: own.numbers)
        self._positions = Bounded(KEPT_NUMBERS, lambda own: own.numel())
        self._counted: dict[object, int] = {}

    def on(self, model: Any) -> Vision:
        """The same for a copy of the model."""
        found = Vision(model, self.processing)
        found.joins = self.joins
        return found

    def modules(self) -> dict[str, Module]:
        """The parts of the model beside its text model and its head: vision tower, projector, ..., by name."""
        base, embedding = self.model.base_model, self.model.get_input_embeddings()
        own = {name: part for name, part in base.named_children() if all(m is not embedding for m in part.modules())}
        return {} if len(own) == len(list(base.named_children())) else own

    def parameters(self) -> list[Parameter]:
        """The parameters of `modules`, and those that the base model holds by itself."""
        base = self.model.base_model
        return [*(p for part in self.modules().values() for p in part.parameters()), *base.parameters(recurse=False)]

    def names(self) -> set[str]:
        """Names of all layers in `modules`, as the whole model calls them."""
        inside = {id(module) for part in self.modules().values() for module in part.modules()}
        return {name for name, module in self.model.named_modules() if id(module) in inside}

    def freeze(self) -> None:
        """Freezes what makes the features of images: vision tower and projector.

        Raises:
            UserError: The family does not keep them apart from its text model.
        """
        if not self.modules():
            raise UserError(
                f"optimizer.vision = frozen: {type(self.model).__name__} does not keep its vision tower apart from its "
                "text model; leave it out"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def learns(self) -> bool:
        """Whether a parameter of the tower or the projector learns."""
        return not self.modules() or any(parameter.requires_grad for parameter in self.parameters())

    def check_counts(self, images: Sequence[PromptImage], *, most: int = _COUNTED) -> None:
        """Checks that the tower makes as many features of images as the processor writes tokens.

        Only images of which the processor makes arrays of different shapes, or with different whole numbers in small
        ones, can differ in that; `most` of these are tried.

        Raises:
            UserError: It does not, or the processor refuses an image.
        """
        kinds: dict[object, PromptImage] = {}
        for image in images:
            arrays = self.processing.arrays([image])
            kinds.setdefault(
                tuple((n, *x.shape, *(x.flatten().tolist() if x.numel() <= 8 else ())) for n, x in arrays.items()),
                image,
            )
            if len(kinds) >= most:
                break
        for key, image in kinds.items():
            if key not in self._counted:
                with torch.no_grad():
                    self.features([image])
                self._counted[key] = 1

    def features(self, images: Sequence[PromptImage]) -> list[Features]:
        """The features of images; an image that occurs twice is computed once.

        Those of a tower that does not learn are kept, in a bounded cache.

        Raises:
            UserError: The tower makes another number of features than there are placeholder tokens.
        """
        different = {image.digest: image for image in images}
        if self.learns:
            found = dict(zip(different, self._computed(list(different.values())), strict=True))
            return [found[image.digest] for image in images]
        device = self.model.device
        state = (str(device), torch.is_autocast_enabled(device.type), self.model.dtype)
        found = {own: self._features.get((own, *state)) for own in different}
        fresh = [own for own, known in found.items() if known is None]
        if fresh:
            with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, which autograd may meet later
                made = self._computed([different[own] for own in fresh])
            for own, features in zip(fresh, made, strict=True):
                found[own] = features
                self._features.put((own, *state), features)
        return [found[image.digest] for image in images]

    def _computed(self, images: Sequence[PromptImage]) -> list[Features]:
        """Runs the tower, once for all images whose arrays fit together."""
        groups: dict[object, list[int]] = {}
        arrays = [self.processing.arrays([image]) for image in images]
        for index, own in enumerate(arrays):
            groups.setdefault(tuple((name, *array.shape[1:]) for name, array in own.items()), []).append(index)
        found: dict[int, Features] = {}
        base = self.model.base_model
        accepted = _named(base.get_image_features)
        for group in groups.values():
            given = {
                name: torch.cat([arrays[index][name] for index in group]).to(self.model.device)
                for name in arrays[group[0]]
                if name in accepted
            }
            out = base.get_image_features(**given, return_dict=True)
            deeper = getattr(out, "deepstack_features", None) or ()
            for place, index in enumerate(group):
                found[index] = Features(out.pooler_output[place], tuple(layer[place] for layer in deeper))
        self.encoded += len(images)
        for index, image in enumerate(images):
            tokens = list(self.processing.ids(image)).count(self.mark)
            if len(found[index].pooled_TD) != tokens:
                raise UserError(
                    f"{self.processing.name}: its processor writes {tokens} placeholder tokens for an image of "
                    f"{image.size[0]} x {image.size[1]} pixels, and its vision tower makes "
                    f"{len(found[index].pooled_TD)} features; its processor_config.json does not fit its config.json"
                )
        return [found[index] for index in range(len(images))]

    def joined(self, ids_RL: Tensor, placed: Sequence[Placed], features: Sequence[Features], **more: Any) -> Any:
        """One pass of the base model over rows that hold images.

        Args:
            ids_RL: Ids of the rows.
            placed: The images in them, row by row and in order.
            features: Of each of these images.
            more: Further arguments of the base model.
        """
        layers = len(features[0].deeper)
        output = SimpleNamespace(
            pooler_output=[own.pooled_TD for own in features],
            deepstack_features=[[own.deeper[layer] for own in features] for layer in range(layers)],
        )
        with self._shown(ids_RL, placed) as shown_RL:
            return self.model.base_model(
                input_ids=shown_RL, mm_encoder_outputs={"image": output}, **self._kinds(ids_RL, placed), **more
            )

    @contextlib.contextmanager
    def own_inputs(self, sequence: TokenSequence) -> Iterator[dict[str, Any]]:
        """The inputs of the model's own forward for one sequence, within whose block it is to be called."""
        placed = [Placed(0, own.position, own) for own in sequence.media]
        ids_1L = sequence.tokens_L[None].to(self.model.device)
        arrays = self.processing.arrays([own.media.payload for own in placed])
        with self._shown(ids_1L, placed) as shown_1L:
            yield {
                "input_ids": shown_1L,
                **{name: array.to(self.model.device) for name, array in arrays.items()},
                **self._kinds(ids_1L, placed),
            }

    def positions(self, sequence: TokenSequence) -> Tensor | None:
        """Positions [axes, L] of a sequence in a family that counts along the sides of images; None in all others."""
        counts = getattr(self.model.base_model, "get_rope_index", None)
        if counts is None:
            return None
        if not sequence.media:
            return torch.arange(len(sequence)).expand(3, -1)
        end = max(own.position + own.length for own in sequence.media)
        first = sequence.part(0, end)
        found_3L = self._positions.got(first.key, lambda: self._counted_along(counts, first))
        # Text goes on behind the largest position of what is before it.
        behind_L = torch.arange(len(sequence) - end) + int(found_3L[:, -1].max()) + 1
        return torch.cat([found_3L, behind_L.expand(len(found_3L), -1)], dim=1)

    def _counted_along(self, counts: Any, sequence: TokenSequence) -> Tensor:
        placed = [Placed(0, own.position, own) for own in sequence.media]
        arrays = [self.processing.arrays([own.media.payload]) for own in placed]
        accepted = _named(counts)
        given = {name: torch.cat([own[name] for own in arrays]) for name in arrays[0] if name in accepted}
        ids_1L = sequence.tokens_L[None]
        kinds = {name: kind for name, kind in self._kinds(ids_1L, placed, every=True).items() if name in accepted}
        with torch.inference_mode(False):
            return counts(ids_1L, **kinds, **given)[0][:, 0]

    def _kinds(self, ids_RL: Tensor, placed: Sequence[Placed], *, every: bool = False) -> dict[str, Tensor]:
        """The kinds of all tokens [R, L], by the names of the base model's arguments."""
        accepted = _named(self.model.base_model.forward)
        found: dict[str, Tensor] = {}
        for own in placed:
            for name, kind in self.processing.kinds(own.media.payload).items():
                if every or name in accepted:
                    kind_RL = found.setdefault(name, torch.zeros(ids_RL.shape, dtype=torch.long))
                    kind_RL[own.row, own.position : own.position + own.media.length] = torch.tensor(kind)
        return {name: kind_RL.to(ids_RL.device) for name, kind_RL in found.items()}

    @contextlib.contextmanager
    def _shown(self, ids_RL: Tensor, placed: Sequence[Placed]) -> Iterator[Tensor]:
        """The ids in which only the tokens of images are placeholders; the embedding still reads all ids as they are.

        A student may generate a placeholder's id. There is no image behind it, and it is a token like any other.
        """
        stray_RL = torch.isin(ids_RL, torch.tensor(sorted(self.marks), device=ids_RL.device))
        for own in placed:
            stray_RL[own.row, own.position : own.position + own.media.length] = False
        if not bool(stray_RL.any()):
            yield ids_RL
            return
        other = next(token for token in range(len(self.marks) + 1) if token not in self.marks)

        def read(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            shown = given[0]
            return given if shown.shape != ids_RL.shape else (torch.where(stray_RL, ids_RL, shown), *given[1:])

        hook = self.model.get_input_embeddings().register_forward_pre_hook(read)
        try:
            yield ids_RL.masked_fill(stray_RL, other)
        finally:
            hook.remove()

    def probe(self) -> Tensor:
        """Features of a made-up image as one vector, in which all weights of the tower take part."""
        found = self.features([made_up()])[0]
        return torch.cat([part.float().flatten() for part in (found.pooled_TD, *found.deeper)])


def tower_of(vision: Vision | None) -> list[Parameter]:
    """All parameters that make features of images; none of a model of text alone."""
    return [] if vision is None else vision.parameters()


def placed_in(rows: Sequence[TokenSequence], shifts: Sequence[int] | None = None) -> list[Placed]:
    """The images of sequences that are rows of a batch, each moved by its shift."""
    return [
        Placed(row, own.position + (0 if shifts is None else shifts[row]), own)
        for row, sequence in enumerate(rows)
        for own in sequence.media
    ]


def _named(function: Any) -> set[str]:
    """Names of a function's arguments."""
    return set(inspect.signature(cast("Any", function)).parameters)
