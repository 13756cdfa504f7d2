"""One replica's engine process: what it is started with, apart from where."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    Flags = list[tuple[str, ...]]

FIRST_PORT: Final = {"vllm": 8000, "sglang": 30000, "trtllm": 8000}
"""The engines' own default ports (vLLM entrypoints/openai/cli_args.py, SGLang server_args.py,
TensorRT-LLM commands/serve.py)."""

OPTIONS_FILE: Final = "trtllm-options.yaml"
RENDEZVOUS_PORT: Final = 5000
"""Port at which SGLang's nodes meet; the one of its own examples."""


@dataclass(frozen=True)
class Server:
    """How to start one replica.

    Parameters
    ----------
    engine, version, model
        What is started.
    program
        Words of the command before its flags.
    flags
        Each flag with its value, if it takes one.
    environment
        Variables that the command needs.
    options
        Content of TensorRT-LLM's file of options; empty where it needs none.
    nodes, devices_per_node
        Machines of the replica, and the devices that it takes of each.
    """

    engine: str
    version: str
    model: str
    program: tuple[str, ...]
    flags: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str]
    options: Mapping[str, object]
    nodes: int
    devices_per_node: int

    def words(self, *more: str) -> list[str]:
        """The command as its words, with ``more`` at its end."""
        return [*self.program, *(word for flag in self.flags for word in flag), *more]

    def shell(self, *more: str, environment: Mapping[str, str] | None = None) -> str:
        """The command as a line for a shell that also writes the file of options.

        Parameters
        ----------
        more
            Words after the last flag.
        environment
            Variables beside the server's own.

        """
        variables = {**(environment or {}), **self.environment}
        assigned = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return self.write_options + " ".join([*assigned, shlex.join(self.words(*more))])

    @property
    def write_options(self) -> str:
        """Start of a shell line that writes the file of options; empty without one."""
        if not self.options:
            return ""
        return f"echo {shlex.quote(json.dumps(self.options))} > {OPTIONS_FILE} && "  # JSON is YAML
