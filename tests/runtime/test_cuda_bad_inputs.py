"""What the backend of our kernels says of a machine, a bundle or a request that does not fit.

Bundles are opened as commands open them; CUDA, its driver and the launcher are stand-ins.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from plugins.launcher import Device
from runtime import kernel_library
from runtime.backends import cuda_backend, open_backend
from runtime.backends.base import BackendUnavailableError, Limits
from runtime.bundle import Bundle
from runtime.gpu.cuda_runtime import require_gpu
from runtime.kernel_library import KERNEL_MANIFEST
from runtime.sampling import SamplingParams
from runtime.session import GenerationSession
from tests.engine_runs import generate, prefill
from tests.fake_kernels import FakeLauncher, PackedBundle
from tests.fake_tensorrt.cuda import FakeCuda, Status
from tests.kernel_tokens import stored_reference
from tests.tiny_doge import write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=8, max_seq_len=16)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed weights of one layer, with fewer and larger programs for the interpreter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
        patched.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
        patched.setattr(projection_matrix, "_FEW_PROGRAMS", 1)
        folder = tmp_path_factory.mktemp("packed")
        write_checkpoint(
            folder / "checkpoint", num_hidden_layers=1, hidden_size=32, intermediate_size=32,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
        )  # fmt: skip
        yield PackedBundle.make(folder, folder / "checkpoint", "fp16", LIMITS)


class Machine:
    """A GPU, its driver, and what loads kernels on it.

    Attributes:
        cuda: its runtime; an RTX 4090's, until a test says otherwise.
        launchers: those that were opened.
    """

    def __init__(self, packed):
        self.cuda = FakeCuda()
        self.launchers = []
        self._specs = packed.kernels.specs

    def load_cuda(self):
        require_gpu(self.cuda)
        return self.cuda

    def device(self, driver):
        name = self.cuda.name_of_gpu.split(b"\0")[0].decode()
        return Device(name=name, compute_capability=self.cuda.capability, driver_version=(13, 0))

    def launcher(self, driver, binaries):
        assert {binary.name for binary in binaries} == {spec.name for spec in self._specs}
        self.launchers.append(FakeLauncher(self.cuda, self._specs))
        return self.launchers[-1]

    def check_untouched(self):
        """Nothing was allocated, and what was opened is closed."""
        assert "cudaMalloc" not in self.cuda.calls
        assert "cudaHostAlloc" not in self.cuda.calls
        assert all(launcher.closed for launcher in self.launchers)

    def check_clean(self):
        assert (self.cuda.ledger.violations, self.cuda.ledger.live) == ([], {})
        assert self.cuda.used_bytes == 0


@pytest.fixture
def machine(packed, monkeypatch):
    found = Machine(packed)
    monkeypatch.setattr(cuda_backend, "load_cuda", found.load_cuda)
    monkeypatch.setattr(kernel_library, "open_driver", object)
    monkeypatch.setattr(kernel_library, "current_device", found.device)
    monkeypatch.setattr(kernel_library, "CudaLauncher", found.launcher)
    return found


@pytest.fixture
def opened(machine, packed, tmp_path):
    """The backend, whose launcher shares the weights between streams."""
    backend = open_backend("cuda", packed.with_kernels(tmp_path))
    weights = backend._weights.address("embedding.weights")
    machine.launchers[0].read_only.append(machine.cuda.find("device memory", weights, 1, "weights"))
    return backend


def prompts(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, length).tolist() for length in lengths]


# The machine.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": 0}, "no NVIDIA driver of the CUDA 13 series was found"),
        ({"driver": 12080}, r"the NVIDIA driver here goes up to CUDA 12\.8.*install a newer"),
        ({"gpus": 0}, "no usable NVIDIA GPU: the driver finds none"),
        (
            {"capability": (7, 5), "name_of_gpu": b"NVIDIA T4\0"},
            r"NVIDIA T4 \(sm75, driver up to CUDA 13\.0\) is older than sm80, which our kernels",
        ),
    ],
    ids=["no driver", "old driver", "no GPU", "old GPU"],
)
def test_machine_that_cannot_run_our_kernels_is_told_what_it_lacks(
    machine, packed, tmp_path, changes, message
):
    for name, value in changes.items():
        setattr(machine.cuda, name, value)
    with pytest.raises(BackendUnavailableError, match=message) as error:
        open_backend("cuda", packed.with_kernels(tmp_path))
    assert "--backend onnxruntime" in str(error.value)
    assert not machine.launchers
    machine.check_untouched()


def test_the_oldest_gpu_that_our_kernels_take_is_enough(machine, packed, tmp_path):
    machine.cuda.capability = (8, 0)
    open_backend("cuda", packed.with_kernels(tmp_path, ("sm80",))).close()
    machine.check_clean()


def test_too_little_memory_for_weights_is_said_before_anything_is_allocated(
    machine, packed, tmp_path
):
    machine.cuda.total_bytes = 20_000
    with pytest.raises(
        BackendUnavailableError,
        match=r"too little GPU memory: \S+ MB are needed \(weights \S+ MB, a cache of 1 sequence "
        r"\S+ MB, what steps write \S+ MB\), 0\.1 MB are free; .*--max-batch-size or",
    ):
        open_backend("cuda", packed.with_kernels(tmp_path))
    assert len(machine.launchers) == 1
    machine.check_untouched()


def test_too_little_memory_for_a_batch_is_said_before_anything_is_allocated(machine, opened):
    machine.cuda.total_bytes = machine.cuda.used_bytes + 1000
    calls = dict(machine.cuda.calls)
    with pytest.raises(
        BackendUnavailableError,
        match=r"\(a cache of 2 sequences \S+ MB, what steps write .* --max-seq-len",
    ):
        generate(opened, prompts(3, 3), GREEDY)
    for name in ("cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags"):
        assert machine.cuda.calls.get(name) == calls.get(name)
    machine.cuda.total_bytes = 24 * 10**9
    assert len(generate(opened, prompts(3), GREEDY)[0]) == 6
    opened.close()
    machine.check_clean()


@pytest.mark.parametrize(("name", "count"), [("cudaMalloc", 2), ("cudaHostAlloc", 6)])
def test_memory_that_others_take_meanwhile_leaves_nothing_behind(machine, opened, name, count):
    """From each of its allocations on, a batch beside another one gets no more."""
    beside = opened.new_cache(1)
    kept = dict(machine.cuda.ledger.live), machine.cuda.used_bytes
    original = getattr(machine.cuda, name)
    for number in range(count + 1):
        calls = []

        def allocate(*arguments, number=number, calls=calls, original=original):
            calls.append(arguments)
            if len(calls) > number:
                return Status.cudaErrorMemoryAllocation, None
            return original(*arguments)

        setattr(machine.cuda, name, allocate)
        if number == count:
            opened.new_cache(2).close()
            break
        with pytest.raises(BackendUnavailableError, match="too little"):
            opened.new_cache(2)
        assert (dict(machine.cuda.ledger.live), machine.cuda.used_bytes) == kept
    assert len(calls) == count
    beside.close()
    opened.close()
    machine.check_clean()


# The bundle.


def test_kernels_for_other_gpus_name_the_targets_and_the_command(machine, packed, tmp_path):
    with pytest.raises(
        BackendUnavailableError,
        match=r"NVIDIA GeForce RTX 4090 is sm89, the bundle's kernels are for sm120, sm90 "
        r"\((\d+) of \1 have no code that it runs\); .*build_kernels\.py BUNDLE --target sm89",
    ):
        open_backend("cuda", packed.with_kernels(tmp_path, ("sm90", "sm120")))
    machine.check_untouched()


def test_one_kernel_without_code_for_the_gpu_is_enough_to_refuse(machine, packed, tmp_path):
    bundle = packed.with_kernels(tmp_path, ("sm89", "sm90"), leave_out=("gather_rows",))
    with pytest.raises(BackendUnavailableError, match=r"\(1 of \d+ have no code that it runs\)"):
        open_backend("cuda", bundle)
    machine.check_untouched()


def test_kernels_of_other_gpus_beside_the_right_ones_do_no_harm(machine, packed, tmp_path):
    open_backend("cuda", packed.with_kernels(tmp_path, ("sm80", "sm89", "sm90"))).close()
    machine.check_clean()


def test_bundle_without_kernels_names_the_command(machine, packed, tmp_path):
    bundle = packed.with_kernels(tmp_path)
    files = [file for file in bundle.manifest.files if file.role != "kernels"]
    bundle = Bundle(tmp_path, dataclasses.replace(bundle.manifest, files=tuple(files)))
    with pytest.raises(BackendUnavailableError, match=r"has no kernels; build them with: python"):
        open_backend("cuda", bundle)
    machine.check_untouched()


def test_altered_kernel_is_not_loaded(machine, packed, tmp_path):
    bundle = packed.with_kernels(tmp_path)
    file = next(f for f in bundle.manifest.files if f.path.endswith(".cubin"))
    (tmp_path / file.path).write_bytes(b"x" * file.bytes)
    with pytest.raises(ValueError, match=r"refusing to load the kernels of bundle"):
        open_backend("cuda", bundle)
    machine.check_untouched()


def test_kernels_of_another_version_are_not_launched(machine, packed, tmp_path):
    packed.with_kernels(tmp_path)
    file = tmp_path / KERNEL_MANIFEST
    data = json.loads(file.read_text())
    data["kernels"][0]["constants"]["COLUMNS"] = 48
    library = kernel_library.KernelLibrary.from_dict(data, file.parent)
    bundle = packed.with_kernels(tmp_path)
    bundle.kernel_library = lambda: library
    with pytest.raises(ValueError, match="was made by another version of the project"):
        open_backend("cuda", bundle)
    machine.check_untouched()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_len": 24}, "do not serve this model: .* is missing"),
        ({"max_batch_size": 9}, "our kernels take up to 8 sequences, max_batch_size is 9"),
    ],
)
def test_limits_beyond_what_was_built_are_refused_when_the_bundle_is_opened(
    machine, packed, tmp_path, change, message
):
    bundle = packed.with_kernels(tmp_path, limits=dataclasses.replace(LIMITS, **change))
    with pytest.raises(ValueError, match=message):
        open_backend("cuda", bundle)
    machine.check_untouched()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int2"}, "variant cuda:fp16 has precision 'int2', expected one of fp16"),
        ({"details": {"inner_values": 3}}, "variant cuda:fp16 has inner values 3, expected"),
        (
            {"details": {"inner_values": {"heads": 1, "count": 0, "picks": 1, "mask_heads": 1}}},
            "expected whole numbers above 0",
        ),
    ],
)
def test_variant_that_no_build_writes_is_refused(machine, packed, tmp_path, change, message):
    bundle = packed.with_kernels(tmp_path)
    variant = dataclasses.replace(packed.variant, **change)
    bundle = Bundle(tmp_path, dataclasses.replace(bundle.manifest, variants=(variant,)))
    with pytest.raises(ValueError, match=message):
        open_backend("cuda", bundle)
    machine.check_untouched()


# The request.


def test_more_context_than_built_is_refused_before_anything_runs(machine, opened):
    session = GenerationSession(opened)
    with pytest.raises(
        ValueError, match=r"prompt 0 has 16 tokens, the limit is 16 .* larger --max-seq-len"
    ):
        session.generate(prompts(16), GREEDY)
    careful = GenerationSession(opened, context_policy="error")
    with pytest.raises(ValueError, match=r"prompt 0: 11 tokens and 6 new ones exceed the context"):
        careful.generate(prompts(11), GREEDY)
    with pytest.raises(ValueError, match=r"3 sequences is outside 1 to 2.*\(--max-batch-size\)"):
        opened.new_cache(3)
    with pytest.raises(ValueError, match=r"17 tokens is outside 1 to 16.*\(--max-seq-len\)"):
        opened.new_cache(1, 17)
    assert len(machine.launchers[0].put) == 0
    cache = opened.new_cache(1)
    with pytest.raises(ValueError, match="0 cached and 17 new tokens exceed the limit of 16"):
        prefill(opened, cache, *prompts(17))
    prefill(opened, cache, *prompts(16))
    with pytest.raises(ValueError, match=r"row 0 already holds 16 tokens, 1 more exceed the limit"):
        opened.decode(np.array([3]), cache)
    # Nothing was written, and nothing is broken.
    opened.rewind(cache, np.array([15]))
    assert opened.decode(np.array([3]), cache).shape == (1, 97)


def test_text_ends_where_the_context_does(opened, packed):
    found = generate(opened, prompts(12), GREEDY)
    reference = stored_reference(packed.network, "fp16", LIMITS)
    assert found == generate(reference, prompts(12), GREEDY)
    assert len(found[0]) == 4


# A launch that fails.


def fail_at(cuda, name, count):
    """Let a call of a name fail, after so many."""
    original, calls = getattr(cuda, name), []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == count + 1:
            return (Status.cudaErrorIllegalAddress, None)
        return original(*arguments)

    setattr(cuda, name, call)


FAILURES = {
    "kernel of a prompt": (None, "gather_rows", r"^step 1 of this batch: gather_rows\S*: cuLaunch"),
    "kernel of a step": (None, "head-", r"^step 2 of this batch: head-\S*: cuLaunchKernel failed"),
    "later step": ("cudaGraphLaunch", 2, r"steps 2 to 4 of this batch: cudaGraphLaunch failed"),
    "fault on the GPU": (
        "cudaEventSynchronize", 1, r"steps 3 to 6 of this batch: cudaEventSync.*IllegalAddress"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("logprobs", [None, 1], ids=["device chooses", "host chooses"])
def test_session_begins_anew_after_a_launch_that_fails(machine, opened, packed, case, logprobs):
    function, at, message = FAILURES[case]
    params = dataclasses.replace(GREEDY, logprobs=logprobs)
    if logprobs is not None and function is not None:
        # The host waits for each step, and none is on the stream behind it.
        if function == "cudaEventSynchronize":
            function, at = "cudaStreamSynchronize", 8
        message = rf"^step 4 of this batch: {function} failed: cudaErrorIllegalAddress"
    expected = generate(stored_reference(packed.network, "fp16", LIMITS), prompts(4), params)
    assert len(set(expected[0])) > 2
    launcher, cuda = machine.launchers[0], machine.cuda
    generate(opened, prompts(3), dataclasses.replace(params, max_tokens=1))  # steps of their own
    if function is None:
        launcher.refuses = at
    else:
        fail_at(cuda, function, at)
    with pytest.raises(RuntimeError, match=message):
        generate(opened, prompts(4), params)
    launcher.refuses = None
    if function is not None:
        delattr(cuda, function)
    assert generate(opened, prompts(4), params) == expected
    opened.close()
    machine.check_clean()
