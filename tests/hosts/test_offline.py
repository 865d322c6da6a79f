"""The offline environment without the real torch_npu: reading libraries, the stand-in, the messages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from npu_fusion import cli
from npu_fusion.hosts import offline
from npu_fusion.hosts.offline import OfflineError, _child, _elf, _standin, _wheel
from npu_fusion.hosts.offline import __main__ as offline_command

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)


def library(folder: Path, name: str, source: str, *options: str) -> _elf.Library:
    path = folder / name
    options = (*options, f"-Wl,-soname,{name}")
    (folder / "source.cpp").write_text(source)
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "source.cpp", *options], check=True)
    return _elf.read(path)


def wheel(folder: Path, project: str, version: str, tags: str, module: str) -> Path:
    """A wheel with one module, as pip wants it."""
    path = folder / f"{project}-{version}-{tags}.whl"
    info = f"{project}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/__init__.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tags}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """torch_npu's wheel, empty, with those of its companions beside it."""
    release, tag = _wheel.torch_release(), _wheel.python_tag()
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "protobuf", "9.0", "py3-none-any", "google")
    wheel(folder, "pyyaml", "9.0", "py3-none-any", "yaml")
    machine = _wheel.platform.machine()
    return wheel(folder, "torch_npu", f"{release}.post3", f"{tag}-{tag}-linux_{machine}", "torch_npu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_FUSION_CACHE", str(tmp_path / "cache"))


# --- libraries and the stand-in


@needs_compiler
def test_what_a_library_defines_wants_and_names(tmp_path: Path) -> None:
    library(tmp_path, "liblow.so.3", 'extern "C" int low() { return 1; }')
    source = """
        #include <cstdio>
        extern "C" { int low(); int absent(); int perhaps() __attribute__((weak));
        int high() { std::puts("x"); return low() + absent() + (perhaps ? perhaps() : 0); } }
    """
    read = library(tmp_path, "libhigh.so", source, str(tmp_path / "liblow.so.3"))
    assert read.soname == "libhigh.so"
    assert "liblow.so.3" in read.needed
    assert "high" in read.defined
    assert read.wanted == {"low", "absent"}  # neither the weak one nor libc's, which has a version


@needs_compiler
def test_missing_is_what_neither_wheel_nor_torch_nor_system_has(tmp_path: Path) -> None:
    torch = library(tmp_path, "libtorch.so", 'extern "C" int torch_part() { return 1; }')
    library(tmp_path, "libascendcl.so", 'extern "C" int aclAbsent() { return 1; }')
    source = """
        #include <cmath>
        extern "C" { int torch_part(); int aclAbsent(); int PyNone_Check();
        double part(double x) { return torch_part() + aclAbsent() + PyNone_Check() + std::cbrt(x); } }
    """
    part = library(tmp_path, "libpart.so", source, f"-L{tmp_path}", "-ltorch", "-lascendcl")
    assert _standin.missing([part], [torch]) == (["aclAbsent"], ["libascendcl.so"])


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("hello")
    with pytest.raises(ValueError, match=r"text.so is not a shared library for 64-bit Linux"):
        _elf.read(tmp_path / "text.so")


@needs_compiler
def test_the_stand_in_answers_a_few_and_refuses_the_rest_by_name(tmp_path: Path) -> None:
    _standin.build(["aclrtGetSocName", "_ZN2ge13GEGetErrorMsgEv"], ["libgraph.so"], ["axis"], tmp_path)
    code = """
import ctypes, sys
cann = ctypes.CDLL(sys.argv[1])
cann.aclrtGetSocName.restype = ctypes.c_char_p
device = ctypes.c_int(7)
assert cann.aclrtGetDevice(ctypes.byref(device)) == 0 and device.value == 0
print(cann.aclrtGetSocName().decode(), flush=True)
cann._ZN2ge13GEGetErrorMsgEv()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "libgraph.so"],
        env={"OFFLINE_ASCEND_SOC": "Ascend950PR_9599"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "Ascend950PR_9599"
    assert "offline stand-in: ge::GEGetErrorMsg() needs CANN and a device" in done.stderr
    assert done.returncode < 0  # ctypes cannot take a C++ exception; torch_npu's callers can


@pytest.mark.parametrize("chosen", [None, "no-such-compiler -O1"])
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if chosen is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", chosen)
    with pytest.raises(OfflineError, match="there is no C.. compiler") as caught:
        _standin.build([], [], [], tmp_path)
    assert (chosen or "c++, g++, clang++") in str(caught.value)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(OfflineError, match=r"does not compile with .*broken:\nno such architecture"):
        _standin.build([], [], [], tmp_path)


# --- the wheel


@needs_compiler
def test_set_up_from_a_wheel_without_network_and_run_a_command(
    wheels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["offline-setup", "--wheel", str(wheels)]) == 0
    folder = _wheel.wheel_folder(tmp_path / "cache")
    assert f"is set up in {folder}" in capfd.readouterr().out
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".dist-info") == [
        "google",
        "torch_npu",
        "yaml",
    ]
    assert _wheel.version(folder) == f"{_wheel.torch_release()}.post3"
    monkeypatch.setattr(_wheel.subprocess, "run", None)  # neither pip nor a compiler runs again
    assert offline.setup() == folder
    monkeypatch.undo()
    monkeypatch.setenv("NPU_FUSION_CACHE", str(tmp_path / "cache"))
    code = "import os, torch_npu; print(torch_npu.__version__, os.environ['OFFLINE_ASCEND_SOC'])"
    command = [sys.executable, "-m", "npu_fusion.hosts.offline", "--soc", "ascend950"]
    done = subprocess.run([*command, "--", sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [f"{_wheel.torch_release()}.post3", "Ascend950PR_9599"], done.stderr
    assert offline_command.main(["--", "no-such-program"]) == 2
    assert capfd.readouterr().err == "cannot run 'no-such-program': No such file or directory\n"


@needs_compiler
def test_the_environment_is_that_of_the_base_with_ours_in_front(wheels: Path) -> None:
    offline.setup(wheels)
    base = {"LD_LIBRARY_PATH": "/a:/b", "HOME": "/home/me"}
    made = offline.environment("Ascend910B3", "8.5.0", base)
    assert made["LD_LIBRARY_PATH"].endswith(":/a:/b")
    assert made["HOME"] == "/home/me"
    assert "torch_npu-" in made["PYTHONPATH"]
    assert (made["OFFLINE_ASCEND_SOC"], made["OFFLINE_ASCEND_CANN"]) == ("Ascend910B3", "8.5.0")
    assert (made["NPU_FUSION_OFFLINE"], made["TORCH_DEVICE_BACKEND_AUTOLOAD"]) == ("1", "1")
    assert base == {"LD_LIBRARY_PATH": "/a:/b", "HOME": "/home/me"}


@needs_compiler
def test_lower_refuses_a_folder_with_files_of_something_else(wheels: Path, tmp_path: Path) -> None:
    offline.setup(wheels)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OfflineError, match=r"which has files of something else; accepted: a directory that"):
        offline.lower("tests.models.w8a8:make_merged", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()
    with pytest.raises(OfflineError, match="thesis.tex', a file; accepted: a directory"):
        offline.lower("tests.models.w8a8:make_merged", tmp_path / "out" / "thesis.tex")


def test_lower_refuses_a_mode_that_torchair_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mode is 'fast'; accepted: 'max-autotune', 'npugraph_ex', 'red"):
        offline.lower("tests.models.w8a8:make_merged", tmp_path, mode="fast")


def test_results_are_compared_with_nan_infinity_and_integers() -> None:
    inf, nan = float("inf"), float("nan")
    values = [torch.tensor([1.0, nan, inf]), torch.tensor([3, -7], dtype=torch.int8), "text"]
    same = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
    assert _child._compare(values, same) == (0.0, 7.0)
    assert _child._compare(values, [same[0], same[1] - 2, "other"]) == (2.0, 7.0)
    for other in (nan, inf, -inf):
        assert _child._compare([torch.ones(1)], [torch.tensor([other])]) == (inf, 1.0)
    assert _child._compare([torch.tensor([1 + 2j])], [torch.tensor([1 + 5j])]) == (3.0, 2.0)
    assert _child._compare([torch.ones(0)], [torch.ones(0)]) == (0.0, 0.0)
    with pytest.raises(
        _child.Failed, match=r"returns torch.float64 of shape \(1,\); eager: torch.float32 of"
    ):
        _child._compare([torch.ones(1)], [torch.ones(1).double()])
    with pytest.raises(_child.Failed, match="the fused model returns 1 values; eager: 2"):
        _child._compare([1, 2], [1])


def test_what_is_not_set_up_names_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cache" / "ascend" / "torch_npu-1.0.0-cp30").mkdir(parents=True)
    assert cli.main(["lower", "tests.models.w8a8:make_merged", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"torch_npu for torch {_wheel.torch_release()} and {_wheel.python_tag()} is not in" in said
    assert "(there is torch_npu-1.0.0-cp30); get it with: npu-fusion offline-setup" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch_npu-1.2.3-{tag}-{tag}-linux_x86_64.whl", "is for torch 1.2.3; installed is torch {release}"),
        ("torch_npu-{release}0-{tag}-{tag}-linux_x86_64.whl", "is for torch {release}0; installed is torch"),
        ("torch_npu-{release}-cp30-cp30-linux_x86_64.whl", "is for Python cp30; this is {tag}"),
        ("torch_npu-{release}-{tag}-{tag}-win_arm.whl", "is for win_arm; this is"),
        ("wheel.whl", "--wheel is 'wheel.whl'; accepted: torch_npu-VERSION-cpXY-cpXY-PLATFORM.whl"),
        (None, "which is no file"),
    ],
)
def test_a_wheel_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, message: str
) -> None:
    facts = {"release": _wheel.torch_release(), "tag": _wheel.python_tag()}
    path = tmp_path / (name or "absent.whl").format(**facts)
    if name is not None:
        path.touch()
    assert cli.main(["offline-setup", "--wheel", str(path)]) == 2
    assert message.format(**facts) in capsys.readouterr().err


def test_where_pip_fails_its_message_is_shown_and_nothing_is_left(wheels: Path, tmp_path: Path) -> None:
    wheels.write_bytes(b"no archive")
    with pytest.raises(OfflineError, match=r"(?s)pip cannot get torch_npu for torch .*\n.*without network"):
        offline.setup(wheels)
    assert list((tmp_path / "cache" / "ascend").iterdir()) == []


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text("#!/bin/sh\necho 'bare-python: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(OfflineError, match="bare-python has no pip; install it"):
        offline.setup(wheels)


@pytest.mark.parametrize(
    ("system", "machine", "message"),
    [
        ("darwin", "arm64", "this is darwin on arm64; torch_npu has wheels for Linux on x86_64 and aarch64"),
        ("linux", "riscv64", "this is linux on riscv64"),
    ],
)
def test_a_platform_without_wheels(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, message: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(_wheel.platform, "machine", lambda: machine)
    for attempt in (offline.setup, offline.environment):
        with pytest.raises(OfflineError, match=message):
            attempt()


def test_packages_of_the_users_that_torch_npu_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel.wheel_folder(tmp_path / "cache").mkdir(parents=True)
    monkeypatch.setattr(_wheel, "_FROM_THE_USER", ("numpy", "no_such_package"))
    with pytest.raises(OfflineError, match="imports no_such_package, not installed here; .* -m pip install"):
        offline.environment()


def test_the_cache_is_below_the_users_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPU_FUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _wheel.cache_root() == Path("/somewhere/npu_fusion")


def test_another_directory_is_told_to_be_exported(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "setup", lambda wheel, root: root / "ascend")
    assert cli.main(["offline-setup", "--wheel", str(wheels), "--dir", str(tmp_path / "here")]) == 0
    assert f"export NPU_FUSION_CACHE={tmp_path / 'here'}" in capsys.readouterr().out


def test_importing_the_package_imports_nothing_of_it() -> None:
    code = "import sys, npu_fusion; print([m for m in sys.modules if 'offline' in m or 'torch_npu' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
