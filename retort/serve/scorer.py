"""What a server computes with its model: it knows nothing of HTTP. Axis letters: see `retort.core`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import retort
from retort.align.pair import SameIds
from retort.core.images import PromptImage
from retort.core.needs import ENTROPY, SAMPLED, Need
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.serve.http import OtherWeightsError, TooLargeError, validated
from retort.serve.images import HeldImages
from retort.teachers.local import LocalTeacher, numbers
from retort.wire.protocol import VERSION, About, unpacked

#: Most of a model's most likely ids that are given a token, and most given ids: an answer is no whole distribution.
MOST_IDS = 4096


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    weights: str


class _Hidden(_Asked):
    narrow: bool


class _Numbers(_Asked):
    vocab: int = Field(ge=1)
    temperature: float = Field(gt=0)
    entropy: bool
    top_k: int = Field(ge=0, le=MOST_IDS)
    budget: int = Field(ge=1)


class _Sampling(_Asked):
    vocab: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    top_p: float = Field(gt=0, le=1)


class Scorer:
    """A model, and what it answers to requests. One request is computed at a time.

    Attributes:
        images: The images that clients sent.
    """

    def __init__(self, lm: LanguageModel, *, name: str, most_tokens: int) -> None:
        """Takes a frozen model.

        Args:
            lm: The model.
            name: Its name for clients.
            most_tokens: Most tokens of one request.
        """
        self.lm, self.most_tokens, self.images = lm, most_tokens, HeldImages()
        head = lm.head()
        self.about = About(
            protocol=VERSION,
            version=retort.__version__,
            name=name,
            precision=lm.precision,
            attention=str(lm.model.config._attn_implementation),
            vocab=head.width,
            rows=lm.rows,
            width=head.weight_VD.shape[1],
            parameters=lm.parameters,
            digest=lm.digest(),
            weights=lm.whole_digest(),
            scale=head.scale,
            soft_cap=head.soft_cap,
            stop=lm.stops.primary,
            stops=sorted(lm.stops.ids),
            packs=lm.packs,
            shared_prefixes=lm.shared_prefixes,
            together_up_to=lm.together_up_to,
            rereads_from=lm.rereads_from,
            rounded=lm.rounded,
            most_tokens=most_tokens,
            images=lm.vision is not None,
        )

    @cached_property
    def files(self) -> dict[str, str]:
        """Files of tokenizer, processor and configuration by name, in base64."""
        lm = self.lm
        with TemporaryDirectory(prefix="retort-") as folder:
            lm.save_tokens(Path(folder))
            lm.model.config.save_pretrained(folder)
            lm.saved_generation.save_pretrained(folder)
            found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        return {name: base64.b64encode(content).decode() for name, content in found.items()}

    def head(self) -> dict[str, Tensor]:
        """The tensors of the head."""
        head = self.lm.head()
        found = {"weight_VD": head.weight_VD, "bias_V": head.bias_V}
        return {name: own.detach().cpu().contiguous() for name, own in found.items() if own is not None}

    def hold(self, tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
        """Holds the images that a request sends; see `HeldImages.exchanged`.

        Raises:
            UserError: The request is none, an image in it cannot be read, or the model reads text alone.
        """
        self._check_sees()
        return self.images.exchanged(tensors)

    def hidden(self, tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
        """Last hidden states at the decided tokens, `hidden_ND`, all sequences in one pass; in bf16 if `narrow`.

        Raises:
            UserError: The request is none, or not of this size or model.
        """
        asked = self._checked(_Hidden, settings)
        sequences = self._sequences(tensors)
        if len(self.lm.batches(sequences, self.most_tokens)) > 1:
            raise TooLargeError(f"a request has at most {self.most_tokens} tokens")
        with torch.inference_mode():
            hidden_ND = self.lm.hidden(sequences)
            return {"hidden_ND": (hidden_ND.bfloat16() if asked.narrow else hidden_ND).cpu()}

    def score(self, tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
        """Numbers about the decided tokens, see `retort.teachers.local.numbers`, and the tokens, `tokens_N`.

        Raises:
            UserError: The request is none, or not of this size or model.
        """
        asked = self._checked(_Numbers, settings)
        sequences = self._sequences(tensors)
        lm, tokens_N = self.lm, torch.cat([own.actions_A for own in sequences])
        if asked.vocab > self.about.vocab or (len(tokens_N) and int(tokens_N.max()) >= asked.vocab):
            raise UserError(f"ids below {asked.vocab} are asked about, and the model has {self.about.vocab}")
        ids_NK = tensors.get("ids_NK")
        if ids_NK is not None:
            given = ids_NK.shape[1] if ids_NK.ndim == 2 and ids_NK.dtype == torch.long else 0
            if not 0 < given <= MOST_IDS or len(ids_NK) != len(tokens_N):
                raise UserError(f"ids_NK has a row of 1 to {MOST_IDS} ids (int64) for every decided token")
            if len(ids_NK) and not 0 <= int(ids_NK.min()) <= int(ids_NK.max()) < asked.vocab:
                raise UserError(f"ids_NK holds ids that are not below {asked.vocab}")
        needs = {SAMPLED, *({ENTROPY} if asked.entropy else ()), *([Need("topk", asked.top_k)] if asked.top_k else ())}
        head = lm.head()
        hidden_ND = lm.all_hidden(sequences, min(asked.budget, self.most_tokens))
        teacher = LocalTeacher(lm, alignment=SameIds(asked.vocab), batch_tokens=asked.budget)
        dense = teacher.dense(tokens_N, hidden_ND, asked.temperature, lambda: head)
        found = numbers(dense, frozenset(needs), ids_NK) if len(tokens_N) else {}
        return {name: own.cpu().contiguous() for name, own in found.items()} | {"tokens_N": tokens_N}

    def generate(self, tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
        """Completions of contexts, drawn with the client's random numbers: `ids_T`, `logp_T` and `lengths_S`.

        Raises:
            UserError: The request is none, or not of this size or model.
        """
        asked = self._checked(_Sampling, settings)
        sequences, rooms_S, uniforms_U = self._sequences(tensors), tensors.get("rooms_S"), tensors.get("uniforms_U")
        if rooms_S is None or uniforms_U is None or uniforms_U.dtype != torch.float64 or uniforms_U.ndim != 1:
            raise UserError("rooms_S and uniforms_U (float64) are needed")
        rooms: list[int] = rooms_S.flatten().tolist()
        if len(rooms) != len(sequences) or min(rooms) < 1 or sum(rooms) != len(uniforms_U):
            raise UserError("rooms_S and uniforms_U disagree")
        if max(len(own) + room for own, room in zip(sequences, rooms, strict=True)) > self.lm.context:
            raise UserError(f"a context and its completion are longer than the model's context, {self.lm.context}")
        if not 0 < asked.vocab <= self.about.vocab or not bool(((uniforms_U >= 0) & (uniforms_U < 1)).all()):
            raise UserError("vocab or a random number is out of its range")
        requests = [Request(own, part) for own, part in zip(sequences, uniforms_U.split(rooms), strict=True)]
        engine = HFEngine(self.lm, vocab=asked.vocab, max_parallel=len(requests))
        written = engine.generate(requests, Sampling(asked.max_new_tokens, asked.temperature, asked.top_p))
        return {
            "ids_T": torch.tensor([token for own in written for token in own.ids]),
            "logp_T": torch.cat([own.logp_A for own in written]),
            "lengths_S": torch.tensor([len(own.ids) for own in written]),
        }

    def _checked(self, kind: type[Any], settings: Any) -> Any:
        """The settings of a request, checked."""
        found = validated(kind, settings)
        if found.weights != self.about.digest:
            raise OtherWeightsError("it has other weights than the run began with; start it with the model that it had")
        return found

    def _sequences(self, tensors: Mapping[str, Tensor]) -> list[TokenSequence]:
        """The sequences of a request, which the model can read."""
        try:
            found = unpacked(tensors, self._shown)
        except UserError:  # an image that is not held
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        longest = max(map(len, found), default=0)
        if not longest:
            raise UserError("a request has at least one sequence")
        if longest > self.lm.context:
            raise UserError(f"a sequence has {longest} tokens, and the model's context {self.lm.context}")
        self.lm.check_readable(found)
        return found

    def _shown(self, digests: Sequence[str]) -> list[PromptImage]:
        """The images that a request names."""
        self._check_sees()
        return self.images.got(digests)

    def _check_sees(self) -> None:
        """Raises `UserError` where the model reads text alone."""
        if not self.about.images:
            raise UserError("its model reads text alone")
