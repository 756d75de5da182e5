"""TokFSM: a language whose hidden state is known (Tamkin et al. 2023, arXiv 2310.17230, section 4).

A walk over N states, each with a few random outgoing edges; a state is written as a fixed number of digits, none of
which alone says which state it is. A text is BOS and the digits of consecutive states.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from saelab.core.config import Config
from saelab.core.errors import ConfigError


class TokFSMConfig(Config):
    """A finite state machine and how it is written."""

    states: int = Field(default=100, ge=2)
    """Number of states."""
    edges: int = Field(default=10, ge=1)
    """Outgoing edges of each state, all equally likely."""
    base: int = Field(default=10, ge=2)
    """Base of the digits; the vocabulary is base + 1 tokens, the last of them BOS."""
    digits: int = Field(default=2, ge=1)
    """Digits of a state."""
    length: int = Field(default=128, ge=2)
    """Digits in a text, beside BOS."""
    seed: int = Field(default=0, ge=0)
    """Seed of the machine."""

    @model_validator(mode="after")
    def _fits(self) -> "TokFSMConfig":
        if self.states > self.base**self.digits:
            raise ValueError(f"{self.states} states need more than {self.digits} digits of base {self.base}")
        if self.edges > self.states:
            raise ValueError(f"edges = {self.edges} is more than states = {self.states}")
        return self


@dataclass(frozen=True, eq=False)
class TokFSM:
    """A machine. Made by :func:`make_tokfsm`."""

    config: TokFSMConfig
    """What it is made of."""
    targets: Int[Tensor, "states edges"]
    """The states that each state may go to."""

    @property
    def bos(self) -> int:
        """Token that begins every text."""
        return self.config.base

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return self.config.base + 1

    def transitions(self) -> Float[Tensor, "states states"]:
        """Probability of each next state."""
        return torch.zeros(self.config.states, self.config.states).scatter_(1, self.targets, 1 / self.config.edges)

    def walk(self, n: int, generator: torch.Generator) -> Int[Tensor, "n n_states"]:
        """Return n walks of as many states as a text holds (a last one may be written in part)."""
        states = [torch.randint(self.config.states, (n,), generator=generator)]
        while len(states) * self.config.digits < self.config.length:
            edge = torch.randint(self.config.edges, (n,), generator=generator)
            states.append(self.targets[states[-1], edge])
        return torch.stack(states, 1)

    def write(self, states: Int[Tensor, "n m"]) -> Int[Tensor, "n t"]:
        """Return walks as tokens: BOS, then ``length`` digits at most."""
        powers = self.config.base ** torch.arange(self.config.digits - 1, -1, -1)
        digits = (states.unsqueeze(2) // powers % self.config.base).flatten(1)[:, : self.config.length]
        return torch.cat([torch.full((len(states), 1), self.bos), digits], 1)

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n t"]:
        """Return n texts of 1 + length tokens."""
        return self.write(self.walk(n, generator))

    def read(self, tokens: Int[Tensor, "n t"]) -> Int[Tensor, "n m"]:
        """Return the states of texts that begin with BOS, -1 where the digits name none; a last part is left out."""
        digits = tokens[:, 1:]
        whole = digits[:, : digits.shape[1] // self.config.digits * self.config.digits]
        powers = self.config.base ** torch.arange(self.config.digits - 1, -1, -1)
        parts = whole.reshape(len(whole), -1, self.config.digits)
        states = (parts * powers).sum(2)
        return torch.where((states < self.config.states) & (parts < self.config.base).all(2), states, -1)

    def legal(self, states: Int[Tensor, "n m"]) -> Bool[Tensor, "n m_less_1"]:
        """Whether each transition of walks exists."""
        possible = self.transitions() > 0
        a, b = states[:, :-1], states[:, 1:]
        return possible[a.clamp(min=0), b.clamp(min=0)] & (a >= 0) & (b >= 0)

    def accuracy(self, tokens: Int[Tensor, "n t"], prompt: int = 1) -> float:
        """Share of the transitions in texts that exist, of those into states written after ``prompt`` tokens.

        Chance, for random states, is edges / states.
        """
        legal = self.legal(self.read(tokens))
        first = max(0, -(-(prompt - 1) // self.config.digits) - 1)
        if legal[:, first:].numel() == 0:
            raise ConfigError("the texts hold no whole transition after the prompt; generate more tokens")
        return float(legal[:, first:].double().mean())


def make_tokfsm(config: TokFSMConfig) -> TokFSM:
    """Draw the edges of a machine: distinct targets for every state."""
    generator = torch.Generator().manual_seed(config.seed)
    targets = torch.rand(config.states, config.states, generator=generator).argsort(1)[:, : config.edges]
    return TokFSM(config, targets)
