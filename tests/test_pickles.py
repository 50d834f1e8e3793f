"""pickles.py: what genuine files hold is read exactly, and nothing in forged or damaged ones is executed or allocated."""
import argparse
import bz2
import collections
import copy
import copyreg
import enum
import functools
import gzip
import io
import lzma
import mmap
import os
import pathlib
import pickle
import pickletools
import random
import resource
import struct
import sys
import time
import tracemalloc
import types
import typing
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch

from checkpoints import pickles
from checkpoints.files import held, read_fairseq
from checkpoints.pickles import Inert, load


def zip_form(value, path):
    torch.save(value, path)


def legacy_form(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def pickle_form(value, path):
    path.write_bytes(pickle.dumps(value))


both_forms = pytest.mark.parametrize("write", [zip_form, legacy_form])


def assert_equal(found, expected):
    """Same types, same dtypes and bits, at any depth; NaN equals NaN."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape and found.stride() == expected.stride()
        assert found.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if expected.dtype.hasobject:
            assert_equal(found.ravel().tolist(), expected.ravel().tolist())
        else:
            assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_equal(list(found.values()), list(expected.values()))
    elif isinstance(expected, Inert):
        assert_equal((found.kind, found.args, found.state, found.items),
                     (expected.kind, expected.args, expected.state, expected.items))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_equal(one, other)
    else:
        assert found == expected or found != found and expected != expected


def refused(path, reason="", error=ValueError):
    with pytest.raises(error, match="convert it to safetensors") as caught:
        load(path)
    assert str(path) in str(caught.value) and reason in str(caught.value), caught.value


# ---------------------------------------------------------------------------------------------- torch files

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8,
          torch.bool, torch.complex64, torch.complex128)
RECENT = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)  # torch reads them in zip form only


def torch_values(dtypes):
    base = torch.arange(60.0).view(5, 12)
    base[0, 0], base[0, 1], base[0, 2] = float("nan"), float("-inf"), -0.0
    values = {str(dtype): base.abs().nan_to_num(1, 1, 1).to(dtype) for dtype in dtypes}
    return values | {
        "turned": base.T, "strided": base[:, 1::3], "rows": base[2:4], "number": torch.tensor(7), "number of a row": base[3, 4],
        "empty": torch.zeros(0, 3), "no columns": torch.zeros(3, 0), "empty view": base[5:], "none": torch.empty(0),
        "shared": base, "one dimension": base.view(-1),
        "expanded in its storage": base[:1].as_strided((3, 4), (1, 1)), "four": torch.ones(1, 2, 1, 3), "size": base.shape,
        "plain": [1, -(2**70), 1.5, None, True, "ü", b"\0\xff", (1, (2, [])), {1: {}}, {"a", "b"}, frozenset([1]), 1 + 2j,
                  bytearray(b"bytes"), bytearray(), b""], "dtype": torch.float16,
    }


@both_forms
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_are_read_bit_by_bit(write, protocol, tmp_path):
    path, expected = tmp_path / "named.bin", torch_values(DTYPES + RECENT if write is zip_form else DTYPES)
    torch.save(expected, path, pickle_protocol=protocol, _use_new_zipfile_serialization=write is zip_form)
    assert_equal(torch.load(path, weights_only=False), expected)
    expected["size"] = tuple(expected["size"])
    found = load(path)
    assert_equal(found, expected)
    found["rows"][0, 0] = 777  # what shared memory shares it still; and the file is not written to
    assert found["shared"][2, 0] == 777 and found["one dimension"][24] == 777 and found["turned"][0, 2] == 777
    assert_equal(load(path), expected)


@both_forms
def test_parameters_and_ordered_dictionaries_become_tensors_and_dictionaries(write, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.expert = "its attribute"
    write({"model": module.state_dict(keep_vars=True), "with attribute": parameter,
           "optimizer": torch.optim.Adam(module.parameters()).state_dict()}, tmp_path / "a.pt")
    found = load(tmp_path / "a.pt")
    assert type(found["model"]) is dict and type(found["with attribute"]) is torch.Tensor
    assert_equal(found["model"], {name: tensor.detach().clone() for name, tensor in module.state_dict().items()})
    assert not any(tensor.requires_grad for tensor in found["model"].values())
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@both_forms
def test_what_would_silently_be_another_number_is_refused(write, tmp_path):
    write({"conjugated": torch.tensor([1 + 2j]).conj()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "no plain view")


def test_a_large_file_is_mapped_and_not_copied(tmp_path):
    torch.save({"weight": torch.full((4 * 1024**2,), 7.0), "other": torch.zeros(999)}, tmp_path / "a.pt")
    start = (tmp_path / "a.pt").read_bytes().index(torch.full((99,), 7.0).numpy().tobytes())
    tracemalloc.start()
    weight = load(tmp_path / "a.pt")["weight"]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert weight.data_ptr() % mmap.PAGESIZE == start % mmap.PAGESIZE > 256  # a page of the file; copies start near a page's


def test_storages_that_are_not_aligned_are_read_all_the_same(tmp_path):
    values = {"a": torch.arange(3.0).double(), "b": torch.arange(3).to(torch.complex128)}
    torch.save(values, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for entry in old.infolist():  # without torch's padding
            new.writestr(entry.filename, old.read(entry))
    found = load(tmp_path / "b.pt")
    assert_equal(found, values)
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())


# ---------------------------------------------------------------------------------------------- fairseq


@pytest.fixture
def packages(monkeypatch):
    """Classes of packages that are gone when the file is read: {name: class}, and a function that removes them."""
    classes = {}
    for name, bases in {"fairseq.data.dictionary.Dictionary": (), "fairseq.logging.meters.AverageMeter": (),
                        "fairseq.logging.meters.MetersDict": (collections.OrderedDict,), "omegaconf.dictconfig.DictConfig": (),
                        "omegaconf.listconfig.ListConfig": (), "omegaconf.nodes.AnyNode": (), "omegaconf.nodes.EnumNode": (),
                        "omegaconf.base.ContainerMetadata": (), "strange.Thing": (), "strange.Words": (list,)}.items():
        module, _, short = name.rpartition(".")
        for i in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:i])
            if part not in sys.modules or sys.modules[part].__spec__ is not None:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        classes[short] = type(short, bases, {"__module__": module})
        setattr(sys.modules[module], short, classes[short])
    sys.modules["strange"].Choice = enum.Enum("Choice", {"LAYER": "layer_norm", "TWO": 2}, module="strange")
    sys.modules["strange"].Text = enum.Enum("Text", {"A": "a"}, module="strange", type=str)
    classes |= {"Choice": sys.modules["strange"].Choice, "Text": sys.modules["strange"].Text}
    return types.SimpleNamespace(**classes), monkeypatch.undo


def made(cls, **state):
    value = cls.__new__(cls)
    value.__dict__.update(state)
    return value


def fairseq_checkpoint(classes, generation):
    tensors = {"conv.weight": torch.arange(12.0).view(3, 4).half(), "norm.weight": torch.nn.Parameter(torch.rand(5)),
               "turned": torch.rand(3, 4).T, "steps": torch.tensor(3)}
    metadata = made(classes.ContainerMetadata, ref_type=typing.Any, object_type=dict, optional=True, key_type=str,
                    element_type=typing.Any, flags={}, resolver_cache=collections.defaultdict(dict, {"a": {"b": 1}}))

    def config(value):
        if isinstance(value, dict):
            node = made(classes.DictConfig, _metadata=metadata, _parent=None)
            node._content = {key: config(item) for key, item in value.items()}
        elif isinstance(value, list):
            node = made(classes.ListConfig, _metadata=metadata, _parent=None, _content=[config(item) for item in value])
        else:
            node = made(classes.EnumNode if isinstance(value, enum.Enum) else classes.AnyNode, _metadata=metadata, _val=value)
        for child in (node._content if isinstance(value, list) else node._content.values() if isinstance(value, dict) else ()):
            child._parent = node  # a circle
        return node

    settings = {"model": {"conv_pos": 128, "layer_norm_first": False, "extractor_mode": classes.Choice.LAYER, "label_rate": 25.0},
                "task": {"normalize": True, "labels": ["km"], "_name": None}}
    namespaces = {key: argparse.Namespace(**value) for key, value in settings.items()}
    meters = classes.MetersDict({"loss": made(classes.AverageMeter, sum=torch.tensor(1.5), count=3)})
    meters.priorities = [(0, "loss")]
    return tensors, {
        "args": argparse.Namespace(**settings["model"], device=torch.device("cpu")) if generation == "args" else None,
        "cfg": {"omegaconf": config(settings), "namespaces": namespaces, "dict": settings, "args": None}[generation],
        "model": collections.OrderedDict(tensors),
        "criterion": made(classes.Thing, weights=[1, 2]),
        "task_state": {"dictionaries": [made(classes.Dictionary, symbols=["<s>", "0", "1"], indices={"<s>": 0}, nspecial=1)]},
        "optimizer_history": [{"lr": np.float64(0.5), "steps": np.int64(3), "path": pathlib.PurePosixPath("/a/b")}],
        "extra_state": {"metrics": meters, "best": collections.Counter("aab"), "words": classes.Words(["a", "b"])},
    }


@pytest.mark.parametrize("generation", ["args", "dict", "namespaces", "omegaconf"])
@pytest.mark.parametrize("protocol", [2, 4])
@both_forms
def test_fairseq_checkpoints_are_read_without_fairseq(write, protocol, generation, packages, tmp_path):
    classes, remove = packages
    tensors, checkpoint = fairseq_checkpoint(classes, generation)
    torch.save(checkpoint, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=write is zip_form)
    remove()
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(tmp_path / "a.pt", weights_only=False)
    found = load(tmp_path / "a.pt")
    assert_equal(found["model"], {name: tensor.detach() for name, tensor in tensors.items()})
    assert found["optimizer_history"][0]["lr"] == 0.5 and type(found["optimizer_history"][0]["steps"]) is int
    assert found["task_state"]["dictionaries"][0].state["nspecial"] == 1
    assert found["criterion"].kind == "strange.Thing" and found["criterion"].state == {"weights": [1, 2]}
    assert found["extra_state"]["best"] == {"a": 2, "b": 1} and found["extra_state"]["words"].items == ["a", "b"]
    assert found["extra_state"]["metrics"].items["loss"].state["count"] == 3
    settings, network = read_fairseq(tmp_path / "a.pt")
    model = {"conv_pos": 128, "layer_norm_first": False, "extractor_mode": "layer_norm", "label_rate": 25.0}
    if generation == "args":
        assert settings == model | {"device": "cpu"}
    else:
        assert [held(label) for label in settings.pop("labels")] == ["km"]
        assert settings == model | {"normalize": True, "_name": None}
    assert_equal(network, found["model"])


def test_unknown_objects_say_what_is_known_of_them(packages, tmp_path):
    classes, remove = packages
    thing = made(classes.Thing, a=1)
    thing.itself = thing
    pickle_form([thing, classes.Thing, classes.Text.A, {thing: "key"}], tmp_path / "a.bin")
    remove()
    found, cls, text, keyed = load(tmp_path / "a.bin")
    assert type(found) is Inert and found.kind == "strange.Thing" and found.args == () and found.items is None
    assert found.state["a"] == 1 and found.state["itself"] is found and keyed == {found: "key"}
    assert cls.kind == "strange.Thing" and cls.args is None and text.args == ("a",)
    assert len(repr(found)) < 40 and "strange.Thing" in repr(found) and "class" in repr(cls)
    with pytest.raises(AttributeError):
        found.a  # noqa: B018


@pytest.mark.parametrize("protocol", range(6))
def test_what_subclasses_of_containers_hold_is_known(protocol, packages, tmp_path):
    classes, remove = packages
    words, meters = classes.Words(["a", ["b"]]), classes.MetersDict(loss=1)
    words.language = "en"
    (tmp_path / "a").write_bytes(pickle.dumps([words, meters, collections.defaultdict(list, a=[1])], protocol=protocol))
    remove()
    found = load(tmp_path / "a")
    assert found[0].kind == "strange.Words" and found[0].items == ["a", ["b"]] and found[0].state == {"language": "en"}
    assert found[1].items == {"loss": 1} and found[2] == {"a": [1]}


# ---------------------------------------------------------------------------------------------- joblib


def estimators():
    cluster = pytest.importorskip("sklearn.cluster")
    points = np.random.default_rng(0).normal(size=(60, 8))
    return {"kmeans64": cluster.KMeans(5, n_init=1, random_state=0).fit(points),
            "kmeans32": cluster.KMeans(5, n_init=1, random_state=np.random.RandomState(0)).fit(points.astype(np.float32)),
            "minibatch": cluster.MiniBatchKMeans(5, n_init=1, random_state=0, batch_size=20).fit(points.astype(np.float32))}


@functools.cache
def estimator(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = estimators()[name]
    fitted.extras_ = {"fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)), "int": np.arange(5, dtype=np.int16),
                      "objects": np.array(["a", None, [1, 2]], dtype=object), "number": np.array(3.5), "none": np.zeros((0, 3)),
                      "big-endian": np.arange(3, dtype=">f4"), "words": np.array(["ab", "ü"]), "bool": np.array([True, False]),
                      "state": np.random.RandomState(1), "shared": [fitted.cluster_centers_] * 2}
    return fitted


def assert_is_estimator(found, name):
    fitted = estimator(name)
    assert type(found) is Inert and found.kind.startswith("sklearn.cluster.") and found.kind.endswith(type(fitted).__name__)
    assert_equal(found.state["cluster_centers_"], fitted.cluster_centers_)
    assert_equal(found.state["labels_"], fitted.labels_)
    assert found.state["n_clusters"] == 5 and found.state["inertia_"] == fitted.inertia_
    extras = dict(fitted.extras_)
    random_state, expected = found.state["extras_"].pop("state"), extras.pop("state").get_state()
    assert type(random_state) is Inert and (random_state.state["state"]["key"] == expected[1]).all()
    assert_equal(found.state["extras_"], extras)
    assert found.state["extras_"]["fortran"].flags.f_contiguous
    found.state["cluster_centers_"][0, 0] = 9  # and it can be written to


each_estimator = pytest.mark.parametrize("name", ["kmeans64", "kmeans32", "minibatch"])


@each_estimator
@pytest.mark.parametrize("compress", [0, 3, 9, ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)], ids=str)
@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
def test_joblib_files_are_read_exactly(name, compress, protocol, tmp_path):
    joblib = pytest.importorskip("joblib")
    path = tmp_path / "centers.pt"  # published k-means files are called .bin and .pt alike
    joblib.dump(estimator(name), path, compress=compress, protocol=protocol)
    assert_is_estimator(load(path), name)


@each_estimator
@pytest.mark.parametrize("age", ["1.1", "not seekable", "sklearn.externals"])
def test_joblib_files_of_other_versions_are_read_exactly(name, age, tmp_path, monkeypatch):
    joblib = pytest.importorskip("joblib")
    wrapper = joblib.numpy_pickle.NumpyArrayWrapper
    create = wrapper.__init__

    def old(self, *arguments, **options):
        create(self, *arguments, **options)
        if age == "not seekable":
            self.numpy_array_alignment_bytes = None
        elif age == "1.1":
            del self.numpy_array_alignment_bytes

    monkeypatch.setattr(wrapper, "__init__", old)
    path = tmp_path / "centers.bin"
    joblib.dump(estimator(name), path, protocol=2)
    monkeypatch.undo()
    assert (joblib.load(path).cluster_centers_ == estimator(name).cluster_centers_).all()
    if age == "sklearn.externals":
        path.write_bytes(path.read_bytes().replace(b"cjoblib.numpy_pickle\n", b"csklearn.externals.joblib.numpy_pickle\n")
                         .replace(b"csklearn.cluster._kmeans\n", b"csklearn.cluster.k_means_\n"))
    assert (b"numpy_array_alignment_bytes" in path.read_bytes()) is (age != "1.1")
    assert_is_estimator(load(path), name)


@each_estimator
@pytest.mark.parametrize("space", [b"", b" "], ids=["python 3", "python 2"])
def test_the_oldest_compressed_joblib_files_are_read_exactly(name, space, tmp_path):
    content = pickle.dumps(estimator(name), protocol=2)
    path = tmp_path / "centers.bin"
    path.write_bytes(b"ZF" + hex(len(content)).encode().ljust(19) + space + zlib.compress(content))
    assert_is_estimator(load(path), name)
    path.write_bytes(b"ZF" + hex(len(content) + 1).encode().ljust(19) + zlib.compress(content))
    refused(path, "does not end")


@pytest.mark.parametrize("name", ["NDArrayWrapper", "ZNDArrayWrapper"])
def test_joblib_dumps_in_several_files_are_refused_with_a_way_out(name, tmp_path):
    compat = pytest.importorskip("joblib.numpy_pickle_compat")
    arguments = ("a.npy", np.ndarray) if name == "NDArrayWrapper" else ("a.npy.z", (), ())
    pickle_form(getattr(compat, name)(*arguments), tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "joblib.dump")


# ---------------------------------------------------------------------------------------------- plain pickles


def plain_values():
    array = np.random.default_rng(0).normal(size=(4, 5))
    return {"float": array, "half": array.astype(np.float16), "int": np.arange(2000), "fortran": np.asfortranarray(array),
            "turned": array.transpose(1, 0), "three": np.ascontiguousarray(np.ones((2, 3, 4))).transpose(2, 0, 1),
            "part": array[:, ::2],
            "number": np.array(2), "none": np.zeros((0, 4)), "objects": np.array([{"a": 1}, (2,), None], dtype=object),
            "complex": array.astype(complex), "words": np.array(["a", "bc"]), "bytes": np.array([b"a", b"bc"]),
            "big-endian": array.astype(">f8"), "bool": array > 0,
            "plain": [1, 2**80, -1, 1.5, "ü\n", b"\n\xff", None, {"a", "b"}],
            "twice": [array, array], "fixed": array.copy()}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("optimized", [False, True])
def test_pickles_of_all_protocols_are_read_exactly(protocol, optimized, tmp_path):
    values = plain_values()
    values["fixed"].flags.writeable = False
    content = pickle.dumps(values, protocol=protocol)
    (tmp_path / "a").write_bytes(pickletools.optimize(content) if optimized else content)
    found = load(tmp_path / "a")
    assert_equal(found, values)
    assert found["twice"][0] is found["twice"][1] and found["fortran"].flags.f_contiguous
    for value in found.values():
        assert type(value) is list or value.flags.writeable


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_numbers_become_python_numbers(protocol, tmp_path):
    values = [np.float64(0.1), np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1 + 2j), np.uint8(200)]
    (tmp_path / "a").write_bytes(pickle.dumps(values, protocol=protocol))
    assert_equal(load(tmp_path / "a"), [value.item() for value in values])


@pytest.mark.parametrize("protocol", range(6))
def test_estimators_in_plain_pickles_are_read_exactly(protocol, tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps(estimator("kmeans32"), protocol=protocol))
    assert_is_estimator(load(tmp_path / "a"), "kmeans32")


def test_both_spellings_of_numpy_and_those_of_python_2_are_read(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"array": array, "number": np.float64(0.5)}, protocol=2)
    assert b"numpy._core.multiarray" in content and b"c_codecs\nencode" in content
    (tmp_path / "a").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_equal(load(tmp_path / "a"), {"array": array, "number": 0.5})
    data = array.tobytes()  # as Python 2 wrote it: the bytes are a string
    content = (b"\x80\x02}(U\x05arraycnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85"
               b"U\x01b\x87R(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
               b"J\xff\xff\xff\xffK\0tb\x89U" + bytes([len(data)]) + data
               + b"tbU\x03setc__builtin__\nset\n](K\x01K\x02e\x85RU\x05orderccollections\nOrderedDict\n](](U\x01aK\x01ee\x85R"
               b"U\x06objectccopy_reg\n_reconstructor\nckmeans\nKMeans\nc__builtin__\nobject\nN\x87R}U\x01kK\x05sbu.")
    assert_equal(pickle.loads(content.partition(b"U\x06object")[0] + b"u.", encoding="latin1")["array"], array)
    (tmp_path / "a").write_bytes(content)
    found = load(tmp_path / "a")
    kmeans = found.pop("object")
    assert_equal(found, {"array": array, "set": {1, 2}, "order": {"a": 1}})
    assert kmeans.kind == "kmeans.KMeans" and kmeans.state == {"k": 5}


# ---------------------------------------------------------------------------------------------- attacks: execution


class Payload:
    """Unpickling it calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Trap:
    """Every method that unpickling it may call makes a folder."""

    def __new__(cls, path=None):
        if path is not None:
            os.mkdir(path)
        return object.__new__(cls)

    def make(self, path):
        os.mkdir(path)

    append = __setstate__ = make

    def __setitem__(self, key, path):
        os.mkdir(path)


class Hashed:
    def __init__(self, path):
        self.path = path

    def __hash__(self):
        os.makedirs(self.path, exist_ok=True)
        return 0

    def __reduce__(self):
        return Hashed, (self.path,)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def call(function, *arguments):
    """Instructions that call; arguments are text or instructions themselves."""
    return function + b"(" + b"".join(text(one) if isinstance(one, str) else one for one in arguments) + b"tR"


TRAP = name("test_pickles", "Trap")
GETATTR, IMPORT = name("builtins", "getattr"), name("importlib", "import_module")
REFUSED = {  # how to make a folder by unpickling -> instructions, or an object to be pickled
    "os.mkdir": lambda sign: Payload(os.mkdir, sign),
    "os.system": lambda sign: Payload(os.system, f"mkdir {sign}"),
    "eval": lambda sign: Payload(eval, f"__import__('os').mkdir({sign!r})"),
    "exec": lambda sign: Payload(exec, f"import os; os.mkdir({sign!r})"),
    "in a list": lambda sign: [1, Payload(os.mkdir, sign)],
    "in a value": lambda sign: {"a": Payload(os.mkdir, sign)},
    "in a key": lambda sign: {Payload(os.mkdir, sign): 1},
    "in an array": lambda sign: np.array([1, Payload(os.mkdir, sign)], dtype=object),
    "partial": lambda sign: call(call(name("functools", "partial"), name("os", "mkdir")), sign) + b".",
    "getattr": lambda sign: call(call(GETATTR, call(IMPORT, "os"), "mkdir"), sign) + b".",
    "__import__": lambda sign: call(call(GETATTR, call(name("builtins", "__import__"), "os"), "mkdir"), sign) + b".",
    "operator": lambda sign: call(call(call(name("operator", "attrgetter"), "mkdir"), call(IMPORT, "os")), sign) + b".",
    "dotted name": lambda sign: call(name("argparse", "_os.mkdir"), sign) + b".",
    "Python 2's name": lambda sign: b"c__builtin__\neval\n" + call(b"", f"__import__('os').mkdir({sign!r})") + b".",
    "INST": lambda sign: b"(S" + repr(sign).encode() + b"\nios\nmkdir\n.",
    "OBJ": lambda sign: b"(cos\nmkdir\nS" + repr(sign).encode() + b"\no.",
    "INST of a package": lambda sign: b"(S" + repr(sign).encode() + b"\nitest_pickles\nTrap\n.",
    "OBJ of a package": lambda sign: b"(ctest_pickles\nTrap\nS" + repr(sign).encode() + b"\no.",
    "EXT1": lambda sign: call(b"\x82\xf0", sign) + b".",
    "EXT2": lambda sign: call(b"\x83\xf0\0", sign) + b".",
    "EXT4": lambda sign: call(b"\x84\xf0\0\0\0", sign) + b".",
    "call of a value": lambda sign: call(call(TRAP, b"N") + b"0" + name("os", "mkdir"), sign) + b".",
}
INERT = {  # the same by way of packages other than the standard library: their names are let in, and do nothing
    "function of a package": lambda sign: Payload(make_folder, sign),
    "dotted name of a package": lambda sign: call(name("torch", "os.mkdir"), sign) + b".",
    "dotted name of a module": lambda sign: call(name("torch.serialization", "os.mkdir"), sign) + b".",
    "__setstate__": lambda sign: TRAP + b")\x81" + text(sign) + b"b.",
    "append": lambda sign: TRAP + b")\x81" + text(sign) + b"a.",
    "__setitem__": lambda sign: TRAP + b")\x81N" + text(sign) + b"s.",
    "__new__": lambda sign: TRAP + text(sign) + b"\x85\x81.",
    "__new__ with options": lambda sign: TRAP + b")}" + text("path") + text(sign) + b"s\x92.",
    "__hash__": lambda sign: {Hashed(sign): 1},
}


def make_folder(path):
    os.mkdir(path)


def in_pickle(content, path):
    path.write_bytes(content)


def in_joblib(content, path):
    path.write_bytes(zlib.compress(content))


def in_zip(content, path, storages=None, byteorder=b"little", **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/version", b"3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


def in_legacy(content, path, storages=None, system=(("little_endian", True),), version=1001):
    parts = [pickle.dumps(value, 2) for value in (pickles.MAGIC, version, dict(system))] + [content]
    parts += [pickle.dumps(sorted(storages or {}), 2)]
    for _, data in sorted((storages or {}).items()):
        parts += [struct.pack("<q", len(data) // 4), data]
    path.write_bytes(b"".join(parts))


def trust(write, path):
    """Read it as one who believes that the file is harmless."""
    joblib = pytest.importorskip("joblib")
    readers = {in_pickle: lambda path: pickle.loads(path.read_bytes()), in_joblib: joblib.load}
    try:
        readers.get(write, lambda path: torch.load(path, weights_only=False))(path)
    except (TypeError, AttributeError, RuntimeError, FileExistsError):
        pass  # what comes after the attack may fail


@pytest.fixture
def extension():
    copyreg.add_extension("os", "mkdir", 240)
    yield
    copyreg.remove_extension("os", "mkdir", 240)


@pytest.mark.parametrize("write", [in_pickle, in_joblib, in_zip, in_legacy])
@pytest.mark.parametrize("attack", [*REFUSED, *INERT])
def test_an_attack_is_not_executed(attack, write, tmp_path, extension):
    sign, path = tmp_path / "executed", tmp_path / "a.bin"
    content = (REFUSED | INERT)[attack](str(sign))
    if not isinstance(content, bytes):
        content = pickle.dumps(content, protocol=2)
    elif content[:1] not in b"(c":
        content = b"\x80\x04" + content
    if sign.exists():  # making a dictionary hashes its keys
        sign.rmdir()
    write(content, path)
    trust(write, path)
    assert sign.is_dir()  # the attack is a real one
    sign.rmdir()
    if attack in REFUSED:
        refused(path)
    else:
        value = load(path)
        assert isinstance(next(iter(value)) if type(value) is dict else value, Inert)
        held(value)
        repr(value)
    assert not sign.exists()


def test_an_attack_names_what_it_asked_for(tmp_path):
    pickle_form([Payload(os.system, "true")], tmp_path / "a.bin")
    reason = f"asks for {os.system.__module__}.system, which has no place in a checkpoint; nothing was executed"
    refused(tmp_path / "a.bin", reason)


def test_only_names_are_called(tmp_path):
    for content in (call(call(name("strange", "Thing")), "argument"), call(b"N"), call(text("os.system")), call(b"])a"),
                    name("strange", "Thing") + b"N\x81", name("strange", "Thing") + b"]R", call(name("torch", "float32"))):
        in_pickle(b"\x80\x04" + content + b".", tmp_path / "a")
        refused(tmp_path / "a")


@pytest.mark.parametrize("where", ["attribute", "array"])
@pytest.mark.parametrize("compress", [0, 3])
def test_an_attack_inside_of_a_genuine_estimator(where, compress, tmp_path):
    joblib = pytest.importorskip("joblib")
    sign, path = tmp_path / "executed", tmp_path / "a.bin"
    fitted = pickle.loads(pickle.dumps(estimator("kmeans64")))
    for function in (os.mkdir, make_folder):
        payload = Payload(function, str(sign))
        fitted.extras_ = np.array([payload, 1], dtype=object) if where == "array" else payload
        joblib.dump(fitted, path, compress=compress)
        joblib.load(path)
        assert sign.is_dir()
        sign.rmdir()
        if function is os.mkdir:
            refused(path, "mkdir")
        else:
            assert_equal(load(path).state["cluster_centers_"], fitted.cluster_centers_)
        assert not sign.exists()


class Victim:
    attribute = "as it was"


def victim(argument="as it was"):
    return argument


@pytest.mark.parametrize("write", [in_pickle, in_joblib, in_zip, in_legacy])
def test_attributes_of_classes_and_functions_cannot_be_set(write, tmp_path, monkeypatch):
    monkeypatch.setattr(Victim, "attribute", "as it was")
    path, defaults = tmp_path / "a.bin", pickles.as_tensor.__defaults__
    state = b"(N}" + text("attribute") + text("changed") + b"st"
    write(b"\x80\x04" + name("test_pickles", "Victim") + state + b"b.", path)
    trust(write, path)
    assert Victim.attribute == "changed"
    Victim.attribute = "as it was"
    refused(path, "sets attributes")
    state = b"(N}" + text("__defaults__") + text("changed") + b"\x85st"
    write(b"\x80\x04" + name("test_pickles", "victim") + state + b"b.", path)
    trust(write, path)
    assert victim() == "changed"
    victim.__defaults__ = ("as it was",)
    refused(path, "sets attributes")
    for ours in ("torch._utils _rebuild_tensor_v2", "numpy.core.multiarray scalar", "collections OrderedDict", "torch float32"):
        write(b"\x80\x04" + name(*ours.split()) + state + b"b.", path)
        refused(path, "sets attributes")
    assert Victim.attribute == victim() == "as it was" and pickles.as_tensor.__defaults__ == defaults
    for target in (b"]", b"K\1", b"N", text("a"), b")", b"\x8f", call(name("builtins", "bytearray")),
                   call(name("torch", "Size"), b")"),
                   call(name("copyreg", "_reconstructor"), name("builtins", "set"), name("builtins", "object"), b"N") + b"0]"):
        write(b"\x80\x04" + target + state + b"b.", path)
        refused(path, "sets attributes")


@pytest.mark.parametrize("content", [b"Pstorage\n.", b"X\1\0\0\0aQ.", b"(X\6\0\0\0moduleNNNNtQ.", b"NQ.", b")Q.", b"]Q.",
                                     b"(X\7\0\0\0storageNNNNtQ.", b"(X\7\0\0\0storagectorch\nFloatStorage\n]NK\1tQ.",
                                     b"(X\7\0\0\0storagecos\nsystem\nNNNtQ.",
                                     b"(X\7\0\0\0storagectorch\nFloatStorage\nX\0\0\0\0NNtQ.",
                                     b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aNNX\1\0\0\0atQ.",
                                     b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" b"0NK\4K\1tQ."])  # a view of another
@pytest.mark.parametrize("write", [in_pickle, in_zip, in_legacy])
def test_references_to_what_is_no_storage_are_refused(write, content, tmp_path):
    write(b"\x80\x02" + content, tmp_path / "a", **({} if write is in_pickle else {"storages": DATA}))
    refused(tmp_path / "a")


@pytest.mark.parametrize("target", [b"N", b"K\1", b")", text("a"), call(name("builtins", "bytearray")), name("strange", "Thing"),
                                    call(name("numpy.core.numeric", "_frombuffer"), b"C\4abcd")])
@pytest.mark.parametrize("items", [b"K\1a", b"(K\1e", b"K\1K\1s", b"(K\1K\1u", b"(K\1\x90"])
def test_only_containers_and_inert_objects_get_items(target, items, tmp_path):
    in_pickle(b"\x80\x04" + target + items + b".", tmp_path / "a")
    refused(tmp_path / "a")
    for wrong in (b"]K\1K\1s", b"}K\1a", b"\x8fK\1a", b"\x8fK\1K\1s", b"](K\1\x90", b"}(K\1u"):
        in_pickle(b"\x80\x04" + wrong + b".", tmp_path / "a")
        refused(tmp_path / "a")


@pytest.mark.parametrize("member", ["../outside", "/outside", "archive/../../outside", "..\\outside", "C:/outside", "\\outside"])
def test_a_zip_archive_cannot_point_out_of_itself(member, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    torch.save({"weight": torch.ones(2)}, folder / "a.pt")
    with zipfile.ZipFile(folder / "a.pt", "a") as archive:
        archive.writestr(zipfile.ZipInfo(member), b"evil")
    refused(folder / "a.pt", "points out of the archive")
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "a.pt"] and not os.path.exists("/outside")


def test_reading_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (zip_form, legacy_form, pickle_form):
        write({"weight": torch.ones(2)} if write is not pickle_form else {"weight": 1}, tmp_path / "a.pt")
        content = (tmp_path / "a.pt").read_bytes()
        load("a.pt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == content


# ---------------------------------------------------------------------------------------------- attacks: memory and time


@pytest.fixture
def bounded():
    """No more than 50 MB are allocated, whoever asks for them, and no more than a few seconds are needed."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, f"{peak:,} bytes"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100e3 and time.monotonic() - start < 10


def number(value):
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def shape(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(numel=4, offset=0, size=(4,), stride=(1,), key="0", storage="FloatStorage", version="_v2", more=b""):
    pid = b"(" + text("storage") + name("torch", storage) + text(key) + text("cpu") + number(numel) + b"tQ"
    return b"\x80\x04" + call(name("torch._utils", f"_rebuild_tensor{version}"), pid, number(offset), shape(size), shape(stride),
                              b"\x89N" if version else b"", more) + b"."


DATA = {"0": np.arange(4, dtype=np.float32).tobytes()}


@pytest.mark.parametrize("write", [in_zip, in_legacy])
def test_forged_tensors_are_refused_and_not_allocated(write, tmp_path, bounded):
    path = tmp_path / "a"
    for version in ("", "_v2"):
        write(tensor(version=version), path, DATA)
        assert_equal(load(path), torch.arange(4.0))
    for options in ({"size": (2, 2), "stride": (2, 1)}, {"size": (3,), "offset": 1}, {"size": (2, 2), "stride": (1, 2)},
                    {"size": (0,)},
                    {"size": (), "stride": (), "offset": 3}, {"size": (2, 2), "stride": (0, 1)}):
        write(tensor(**options), path, DATA)
        expected = torch.arange(4.0).as_strided(options["size"], options.get("stride", (1,)), options.get("offset", 0))
        assert_equal(load(path), expected)
    for reason, forged in {
        "leaves its storage": (
            {"size": (5,)}, {"offset": 1}, {"offset": 2**60}, {"size": (2**60,), "stride": (0,)}, {"size": (5,), "stride": (0,)},
            {"size": (2**40, 2**40), "stride": (0, 0)}, {"size": (2,), "stride": (4,)}, {"size": (2,), "stride": (2**62,)},
            {"size": (2**31, 2**31), "stride": (2**62, 2**62)}, {"size": (4, 1), "stride": (1, 2**62), "offset": 1}),
        "not made of numbers": (
            {"offset": -1}, {"size": (-1,)}, {"stride": (-1,), "offset": 3}, {"size": (-2, -2), "stride": (1, 1)}, {"numel": -4},
            {"offset": 2**63}, {"numel": 2**66}, {"size": (1,) * 100, "stride": (1,) * 100}),
        "bytes" if write is in_zip else "promises more bytes": (
            {"numel": 2**60}, {"numel": 2**60, "size": (2**60,)}, {"numel": 2**33, "size": (1,)}, {"numel": 10**4}),
        "": ({"size": (4, 1)}, {"size": ()}, {"numel": 5}, {"numel": 3}, {"key": "1"}, {"key": "../0"}, {"key": ""},
             {"storage": "DoubleStorage"}, {"storage": "QInt8Storage"}, {"storage": "float32"}, {"version": "_v3"},
             {"size": (0, 2**62, 2**62), "stride": (1, 1, 1), "offset": 5}, {"version": "_v3", "more": name("os", "system")},
             {"version": "_v3", "more": number(2**60)})}.items():
        for options in forged:
            write(tensor(**options), path, DATA)
            refused(path, reason)


def test_storages_without_references_or_bytes_are_refused(tmp_path):
    path = tmp_path / "a"
    in_legacy(tensor(), path, DATA | {"1": b"1234"})
    refused(path, "not those that its tensors ask for")
    in_legacy(tensor(), path, {})
    refused(path, "not those that its tensors ask for")
    in_zip(tensor(), path, {})
    refused(path)
    in_legacy(tensor(), path, {"0": DATA["0"] * 2})
    refused(path, "another size")
    in_zip(tensor(), path, {"0": DATA["0"] * 2})
    refused(path, "has 32 bytes")


def test_files_of_big_endian_machines_and_unknown_versions_are_refused(tmp_path):
    in_zip(tensor(), tmp_path / "a", DATA, byteorder=b"big")
    refused(tmp_path / "a", "big-endian")
    for options in ({"system": [("little_endian", False)]}, {"system": ()}, {"version": 1002}):
        in_legacy(tensor(), tmp_path / "a", DATA, **options)
        refused(tmp_path / "a", "big-endian")


def test_compressed_and_overlapping_zip_archives_are_refused(tmp_path, bounded):
    in_zip(tensor(numel=2**23, size=(2**23,)), tmp_path / "a", {"0": b"\0" * 2**25}, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a").stat().st_size < 2**16
    refused(tmp_path / "a", "compressed")
    in_zip(tensor(), tmp_path / "a", DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "a", "a") as archive:
            archive.writestr("archive/data/0", b"0" * 16)
    refused(tmp_path / "a", "overlap")
    in_zip(tensor(), tmp_path / "a", {"0": b"0" * 2000})
    with zipfile.ZipFile(tmp_path / "a", "a") as archive:  # other names for the same bytes
        archive.writestr("last", b"")
        for i in range(100):
            entry = copy.copy(archive.getinfo("archive/data/0"))
            entry.filename = f"archive/data/more{i}"
            archive.filelist.append(entry)
    refused(tmp_path / "a", "overlap")
    for names in ([], ["data.pkl"], ["a/data.pkl", "b/data.pkl"], ["a/b/data.pkl"]):
        with zipfile.ZipFile(tmp_path / "a", "w") as archive:
            archive.writestr("other", b"")
            for one in names:
                archive.writestr(one, b"N.")
        refused(tmp_path / "a", "without one data.pkl")


@pytest.mark.parametrize("content", {
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 2**60), "BINUNICODE8": b"\x8d" + struct.pack("<Q", 2**60),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**60), "BYTEARRAY8 of 8 GB": b"\x96" + struct.pack("<Q", 2**33),
    "BINBYTES": b"B\xff\xff\xff\x7f", "BINSTRING": b"T\xff\xff\xff\x7f", "LONG4": b"\x8b\xff\xff\xff\x7f",
    "negative": b"\x8b\xff\xff\xff\xff",
    "FRAME": b"\x95" + struct.pack("<Q", 2**60), "PUT": b"Np99999999999999\n", "LONG_BINPUT": b"Nr\xff\xff\xff\xff0",
    "INT": b"I" + b"9" * 10**6 + b"\n", "bytes of a number": call(name("builtins", "bytes"), number(2**40)),
    "bytearray of a number": call(name("builtins", "bytearray"), number(2**40)),
    "range": call(name("builtins", "range"), number(2**60)),
    "list of a range": call(name("builtins", "set"), call(name("builtins", "range"), number(2**60))),
    "NEXT_BUFFER": b"\x97", "READONLY_BUFFER": b"C\1a\x98"}.items(), ids=lambda item: item[0])
def test_lengths_that_lie_are_refused_and_not_allocated(content, tmp_path, bounded):
    for write in (in_pickle, in_joblib, in_zip, in_legacy):
        write(b"\x80\x04" + content[1] + (b"." if content[0] not in ("PUT", "LONG_BINPUT", "range") else b"0."), tmp_path / "a")
        refused(tmp_path / "a")


def array_state(values, code="f4", data=b"", order="<"):
    end = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    dtype = call(name("numpy", "dtype"), code, b"\x89\x88") + b"(K\3" + text(order) + end
    return dtype, b"(K\1" + shape(values) + dtype + b"\x89" + data + b"tb"


@pytest.mark.parametrize("values, code, data", [
    ((2**40,), "f4", b"C\x04abcd"), ((2**40, 2**40), "f4", b"C\x04abcd"), ((2,), "f4", b"C\x04abcd"), ((-1,), "f4", b"C\x04abcd"),
    ((2**60,), "O8", b"]"), ((2**60,), "O8", b"]Na"), ((1,), "f4", b"]Na"), ((1,), "O8", b"C\x08abcdefgh"),
    ((1,), "V4", b"C\x04abcd"),
    ((1,), "f4", number(2**40)), ((1,), "S0", b"C\0"), ((2**60,), "S0", b"C\0"), ((1,), "S4294967296", b"C\x04abcd"),
    ((1,), "f4,f4", b"C\x08abcdefgh"), ((1,) * 70, "f4", b"C\x04abcd"), ((0, 2**62), "f4", b"C\0"),
    ((1,), "M8", b"C\x08abcdefgh")])
def test_forged_arrays_are_refused_and_not_allocated(values, code, data, tmp_path, bounded):
    dtype, state = array_state(values, code, data)
    reconstruct = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\0\x85", "b")
    frombuffer = call(name("numpy._core.numeric", "_frombuffer"), data, dtype, shape(values), "C")
    wrapper = (name("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81}(" + text("shape") + shape(values) + text("dtype")
               + dtype
               + text("order") + text("C") + b"ub")
    genuine = reconstruct + array_state((1,), "f4", b"C\x04abcd")[1]
    in_pickle(b"\x80\x04" + genuine + b".", tmp_path / "a")
    assert load(tmp_path / "a").tobytes() == b"abcd"
    for content in (reconstruct + state, frombuffer, wrapper + data[2:]):
        in_pickle(b"\x80\x04" + content + b".", tmp_path / "a")
        refused(tmp_path / "a")


def test_a_value_copied_ten_thousand_times_is_refused(tmp_path, bounded):
    large = b"B" + struct.pack("<I", 2**20) + b"\0" * 2**20 + b"\x94"
    dtype, state = array_state((2**20,), "u1", b"h\0", order="|")
    reconstruct = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\0\x85", "b")
    for content in (large + call(name("builtins", "bytearray"), b"h\0") * 10_000, large + (reconstruct + state) * 5000,
                    large + call(name("numpy.core.numeric", "_frombuffer"), b"h\0", dtype, shape((2**20,)), "C") * 5000,
                    b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(50_000)) + b"e\x94"
                    + call(name("builtins", "set"), b"h\0") * 10_000):
        in_pickle(b"\x80\x04](" + content + b"e.", tmp_path / "a")
        refused(tmp_path / "a", "many times its own size")


@pytest.mark.slow
@pytest.mark.parametrize("compress", [zlib.compress, gzip.compress, bz2.compress, lzma.compress,
                                      lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
                                      lambda data: b"ZF" + hex(len(data)).encode().ljust(19) + zlib.compress(data)],
                         ids=["zlib", "gzip", "bz2", "xz", "lzma", "ZF"])
def test_a_file_that_decompresses_without_end_is_refused(compress, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "LARGEST", 2**22)
    content = pickle.dumps(b"\0" * 2**21)
    (tmp_path / "a").write_bytes(compress(content))
    assert load(tmp_path / "a") == b"\0" * 2**21
    bomb = compress(b"\0" * 2**26)
    (tmp_path / "a").write_bytes(bomb)
    tracemalloc.start()
    refused(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(bomb) < 2**20 and peak < 20e6, f"{peak:,} bytes"


def test_lzma_cannot_ask_for_gigabytes_of_dictionary(tmp_path, bounded):
    content = bytearray(lzma.compress(pickle.dumps(1), lzma.FORMAT_ALONE, preset=0))
    for size in (2**23, 2**31):
        content[1:5] = struct.pack("<I", size)
        (tmp_path / "a").write_bytes(content)
        if size == 2**23:
            assert load(tmp_path / "a") == 1
        else:
            refused(tmp_path / "a", "LZMAError")


@pytest.mark.slow
def test_nesting_can_neither_crash_nor_stall(tmp_path, bounded):
    pairs = b")" + b"2\x86" * 60  # a pair of pairs of pairs ...
    chain = b")" + b"\x85" * 20_000
    for key in (pairs, chain):
        for content in (b"}" + key + b"Ns", b"\x8f(" + key + b"\x90", b"(" + key + b"\x91",
                        b"(" + key + b"Nd", b"}(" + key + b"Nu",
                        call(name("builtins", "set"), b"](" + key + b"e"), call(name("builtins", "frozenset"), key + b"\x85"),
                        call(name("collections", "OrderedDict"), b"](" + key + b"N\x86e")):
            in_pickle(b"\x80\x04" + content + b".", tmp_path / "a")
            refused(tmp_path / "a", "as a key")
        for write in (in_zip, in_legacy):  # as the key of a storage
            write(b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + key + b"NK\1tQ.", tmp_path / "a")
            refused(tmp_path / "a")
    reconstruct = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\0\x85", "b")
    _, state = array_state((1,), "O8", b"]" + reconstruct + array_state((1,), "O8", b"]Na")[1] + b"a", order="|")
    in_pickle(b"\x80\x04" + reconstruct + state + b".", tmp_path / "a")
    refused(tmp_path / "a", "holds another")
    in_pickle(b"\x80\x04" + chain + b".", tmp_path / "a")
    assert len(load(tmp_path / "a")) == 1
    in_pickle(b"\x80\x04" + pairs + b".", tmp_path / "a")
    assert len(load(tmp_path / "a")) == 2


# ---------------------------------------------------------------------------------------------- damage


def small_files():
    values = {"weight": torch.arange(6.0).view(2, 3), "turned": torch.ones(3, 2).T, "half": torch.ones(5).half(),
              "text": ["a", (1, 2.5)]}
    arrays = {"centers": np.arange(12.0).reshape(3, 4), "k": 3, "objects": np.array(["a", None], dtype=object), "set": {1, 2}}
    thing = argparse.Namespace(arrays=arrays, words=collections.OrderedDict(a=1))
    files = {}
    for key, options in {"torch": {}, "legacy torch": {"_use_new_zipfile_serialization": False}}.items():
        buffer = io.BytesIO()
        torch.save(values, buffer, **options)
        files[key] = buffer.getvalue()
    for key, options in {"joblib": {}, "joblib zlib": {"compress": 3}, "joblib xz": {"compress": ("xz", 3)},
                         "joblib bz2": {"compress": ("bz2", 3)}, "joblib gzip": {"compress": ("gzip", 3)}}.items():
        buffer = io.BytesIO()
        pytest.importorskip("joblib").dump(thing, buffer, **options)
        files[key] = buffer.getvalue()
    for protocol in (0, 2, 5):
        files[f"pickle {protocol}"] = pickle.dumps(thing, protocol)
    return files


FILES = ["torch", "legacy torch", "joblib", "joblib zlib", "joblib xz", "joblib bz2", "joblib gzip",
         "pickle 0", "pickle 2", "pickle 5"]
each_file = pytest.mark.parametrize("kind", FILES)


@each_file
def test_a_file_cut_short_or_continued_is_an_error_that_names_it(kind, tmp_path):
    whole, path = small_files()[kind], tmp_path / "a.pt"
    path.write_bytes(whole)
    load(path)
    for length in range(0, len(whole), max(1, len(whole) // 400)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[:-1])
    refused(path)
    if kind != "torch":  # a zip archive may have bytes before and after it
        for more in (b"\0", b".", whole):
            path.write_bytes(whole + more)
            refused(path)


@pytest.mark.parametrize("content", [
    b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"PK\3\4 no archive",
    bytes(range(256)), b"\0" * 64, b"", b"\x78\x9c", b"BZh9", b"ZF", b"\xfd7zXZ\0", b"\x1f\x8b", b"\x93NUMPY\1\0v\0{'descr': }",
    b"\x04\x22M\x18 lz4"], ids=lambda content: repr(content[:6]))
def test_a_file_of_something_else_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin")


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            load(path)
    pickle_form(1, tmp_path / "a")
    assert load(str(tmp_path / "a")) == 1


@pytest.mark.parametrize("content", [b"K\1K\2.", b"(K\1.", b"((K\1t.", b"]K\1.", b"K\1..", b"K\1."[:-1], b"."])
def test_a_pickle_that_stops_in_the_middle_is_an_error(content, tmp_path):
    for write in (in_pickle, in_joblib, in_zip, in_legacy):
        write(b"\x80\x04" + content, tmp_path / "a")
        refused(tmp_path / "a")


def test_random_bytes_are_an_error(tmp_path):
    generator = random.Random(0)
    for head in (b"", b"\x80\x04", b"\x80\x02}(", b"PK\3\4", b"\x78\x9c", pickle.dumps(pickles.MAGIC, 2)):
        for length in (10, 1000, 100_000):
            for _ in range(20 if length < 10**5 else 2):
                (tmp_path / "a").write_bytes(head + generator.randbytes(length))
                refused(tmp_path / "a")


def assert_is_data(value, depth=0):
    assert type(value) in (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, bool, complex, type(None),
                           torch.Tensor, torch.dtype, np.ndarray, Inert), type(value)
    for item in (value.items() if type(value) is dict else value if type(value) in (list, tuple) else
                 (value.args, value.state, value.items) if type(value) is Inert else ()):
        assert_is_data(item, depth + 1)


@each_file
def test_a_flipped_byte_is_an_error_or_other_data(kind, tmp_path):
    whole, path, generator = small_files()[kind], tmp_path / "a.pt", random.Random(0)
    path.write_bytes(whole)
    expected, errors = load(path), 0
    tracemalloc.start()
    for _ in range(300):
        damaged, at = bytearray(whole), generator.randrange(len(whole))
        damaged[at] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            found = load(path)
        except ValueError as error:
            assert "convert it to safetensors" in str(error) and str(path) in str(error)
            errors += 1
            continue
        assert_is_data(found)
        if kind == "torch":
            assert_equal(found, expected)
        elif kind.startswith("joblib "):
            assert_equal(found, expected)  # compressed ones have checksums, or bytes that mean nothing
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 300 >= errors > 60 and peak < 50e6, (errors, peak)


# ---------------------------------------------------------------------------------------------- settings


def test_wrappers_in_settings_give_what_they_hold_and_anything_else_is_left_alone():
    namespace, choice = Inert("argparse.Namespace", ()), Inert("strange.Choice", ("layer",))
    namespace.state = {"a": 1}
    two = [Inert("omegaconf.nodes.EnumNode", ()), Inert("omegaconf.nodes.AnyNode", ())]
    two[0].state, two[1].state = {"_val": choice, "_metadata": None}, {"_val": two[1]}
    assert held(namespace) == {"a": 1} and held(choice) == "layer" and held(two[0]) == "layer"
    two[0].state["_val"] = two[1]
    assert held(two[0]) is two[1] is held(two[1])  # forged circles end
    unknown, cls, many = Inert("strange.Thing", ()), Inert("strange.Choice"), Inert("strange.Thing", (1, 2))
    assert all(held(value) is value for value in (unknown, cls, many, None, 3, "a", [choice]))


def test_nothing_is_imported_by_reading(tmp_path, packages):
    classes, remove = packages
    pickle_form([made(classes.Thing, a=1), collections.Counter("ab")], tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\x80\x04" + call(name("antigravity_", "fly")) + b"0" + name("turtle_", "demo.main") + b".")
    remove()
    before = set(sys.modules)
    load(tmp_path / "a")
    load(tmp_path / "b")
    assert set(sys.modules) == before
