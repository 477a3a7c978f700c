"""transformers, llama.cpp and OpenVINO as systems to be measured; packages load when opened."""

from __future__ import annotations

import ctypes
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import BackendUnavailableError, Ids
from runtime.system_process import Timing


class TransformersSystem:
    """transformers' `generate`, greedy, float32, eager attention: the published way to run Doge.

    Attributes:
        backend: `transformers`.
        variant: `eager-fp32`.
    """

    backend = "transformers"
    variant = "eager-fp32"

    def __init__(self, network: Any, torch: Any) -> None:
        """Measure an opened network.

        Args:
            network: `DogeForCausalLM`; its end-of-text id is taken away, so that it never stops.
            torch: the package.
        """
        self._network = network
        self._torch = torch
        network.generation_config.eos_token_id = None

    def run(self, prompts: Ids, output_len: int) -> Timing:
        """Generate from prompts [1, S]; a token counts when `generate` hands it to its streamer."""
        clock = _Clock()
        ids = self._torch.from_numpy(prompts)
        self._network.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=output_len,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            streamer=clock,
        )
        begin, _, *tokens = clock.marks  # the first thing handed over is the prompt
        return _timing([begin, *tokens], output_len)

    def close(self) -> None:
        """Nothing is held beyond the process."""


class LlamaCppSystem:
    """llama.cpp through its C interface, greedy, with the defaults of a context (keys in F16).

    Attributes:
        backend: `llama.cpp`.
        variant: format of the weights.
    """

    backend = "llama.cpp"

    def __init__(self, library: Any, model: Any, context: Any, variant: str) -> None:
        """Measure an opened context.

        Args:
            library: the package llama_cpp.
            model: its model.
            context: its context.
            variant: format of the weights.
        """
        self.variant = variant
        self._library = library
        self._model = model
        self._context = context
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def run(self, prompts: Ids, output_len: int) -> Timing:
        """Generate from prompts [1, S]."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        prompt = (library.llama_token * prompts.shape[1])(*prompts[0].tolist())
        one = (library.llama_token * 1)()
        marks = [time.perf_counter()]
        one[0] = self._feed(prompt)
        marks.append(time.perf_counter())
        for _ in range(output_len - 1):
            one[0] = self._feed(one)
            marks.append(time.perf_counter())
        return _timing(marks, output_len)

    def close(self) -> None:
        """Free the context and the model."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _feed(self, tokens: Any) -> int:
        """Append the tokens and give the most likely next one."""
        library = self._library
        status = library.llama_decode(
            self._context, library.llama_batch_get_one(tokens, len(tokens))
        )
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status} for {len(tokens)} tokens")
        logits = library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


class OpenVinoSystem:
    """OpenVINO's CPU plugin, greedy, set for latency, otherwise with its defaults.

    These are a cache of 8 bits, and products in bfloat16 where the CPU has them.

    Attributes:
        backend: `openvino`.
        variant: format of the weights.
    """

    backend = "openvino"

    def __init__(self, request: Any, variant: str) -> None:
        """Measure a request of a compiled model, see `write_openvino_llama`.

        Args:
            request: its state is the cache.
            variant: format of the weights.
        """
        self.variant = variant
        self._request = request
        self._beam = np.zeros(1, np.int32)

    def run(self, prompts: Ids, output_len: int) -> Timing:
        """Generate from prompts [1, S]."""
        self._request.reset_state()
        length = prompts.shape[1]
        marks = [time.perf_counter()]
        token = self._feed(prompts, 0)
        marks.append(time.perf_counter())
        for position in range(length, length + output_len - 1):
            token = self._feed(np.array([[token]]), position)
            marks.append(time.perf_counter())
        return _timing(marks, output_len)

    def close(self) -> None:
        """Nothing is held beyond the process."""

    def _feed(self, ids: Ids, start: int) -> int:
        """Append the tokens [1, S] from position `start` on and give the most likely next one."""
        positions = np.arange(start, start + ids.shape[1])
        inputs = {"input_ids": ids, "position_ids": positions, "beam_idx": self._beam}
        logits = self._request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
        return int(logits.argmax())


class _Clock:
    """A streamer that notes when it was made and when each token came."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def put(self, value: object) -> None:
        """Note the time."""
        del value
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def import_peer(name: str) -> Any:
    """A package that the product does not need.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{error.name} is not installed; run: pip install -r benchmarks/requirements.txt"
        ) from error


def open_transformers(checkpoint: Path, threads: int) -> TransformersSystem:
    """Open a checkpoint of generation G4.

    Raises:
        BackendUnavailableError: torch or transformers is missing, or does not load it.
    """
    torch = import_peer("torch")
    torch.set_num_threads(threads)
    # Imported here, because it imports torch, which would count as memory of every other system.
    from model.transformers_reference import TransformersReference, TransformersUnavailableError

    try:
        reference = TransformersReference.open(checkpoint, "eager")
    except TransformersUnavailableError as error:
        raise BackendUnavailableError(str(error)) from error
    return TransformersSystem(reference.network, torch)


def open_llama_cpp(file: Path, variant: str, *, capacity: int, threads: int) -> LlamaCppSystem:
    """Open a GGUF file with room for `capacity` tokens.

    Raises:
        BackendUnavailableError: llama-cpp-python is missing.
        ValueError: llama.cpp does not load the file.
    """
    library = import_peer("llama_cpp")
    silent = library.llama_log_callback(_say_nothing)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    _KEPT.append(silent)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        str(file).encode(), library.llama_model_default_params()
    )
    parameters = library.llama_context_default_params()
    parameters.n_ctx = capacity
    parameters.n_batch = max(parameters.n_batch, capacity)  # a prompt is handed over in one call
    parameters.n_threads = parameters.n_threads_batch = threads
    context = library.llama_init_from_model(model, parameters) if model else None
    if not context:
        raise ValueError(f"llama.cpp does not load {file}")
    return LlamaCppSystem(library, model, context, variant)


def open_openvino(file: Path, variant: str, *, threads: int) -> OpenVinoSystem:
    """Open a model that `write_openvino_llama` wrote.

    Weights in float32 are computed with in float32, as by the systems beside it.

    Raises:
        BackendUnavailableError: openvino is missing.
    """
    core = import_peer("openvino").Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if variant == "F32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(str(file), "CPU", settings)
    return OpenVinoSystem(compiled.create_infer_request(), variant)


# What C code calls back must outlive every call.
_KEPT: list[object] = []


def _say_nothing(level: int, text: bytes, data: object) -> None:
    del level, text, data


def _timing(marks: list[float], output_len: int) -> Timing:
    first, *later = np.diff(marks).tolist()
    if len(later) != output_len - 1:
        raise RuntimeError(f"{len(later) + 1} tokens were generated, expected {output_len}")
    return Timing(ttft_s=first, step_s=tuple(later))
