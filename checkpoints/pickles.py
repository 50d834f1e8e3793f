"""Foreign pickles -> plain data, tensors and arrays; nothing in them is executed.

A pickle is a program for a small stack machine: push a number, make a list, look up a name, call what is on the stack. The
last two are the danger, for `os.system` is a name too. The machine below has the same instructions, but a name is only a
label (an `Inert`): calling it makes an `Inert` that remembers the arguments, except for the few names in OURS, which stand
for functions of this file. Nothing is ever imported, and no attribute of anything is ever looked up or set.

    file --by its first bytes, never by its name-->
        zip archive       torch >= 1.6: X/data.pkl is the pickle, X/data/KEY are the storages, as views of the mapped file
        zlib, gzip, ...   joblib: one compressed stream around one of the two below
        a magic number    torch < 1.6: five pickles (magic, version, system, object, keys), then the bytes of every storage
        anything else     a pickle; in joblib's, the bytes of an array follow the instruction that describes the array

A file that lies about lengths must not fill the memory either: what is made of a file is bounded by the bytes it has.

Sources: the comments of CPython's Lib/pickletools.py; torch/serialization.py; joblib/numpy_pickle.py; PKWARE's APPNOTE.TXT.
"""
import copy
import io
import lzma
import math
import mmap
import pickle
import re
import struct
import sys
import zipfile
import zlib
from bz2 import BZ2Decompressor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

LARGEST = 4 * 1024**3  # bytes that a compressed file may become
PIECE, STEP = 1024, 4 * 1024**2  # bytes in and bytes out at a time; zlib makes at most 1032 of one, the others stop at STEP
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a torch file from before 1.6
DAMAGED = (ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, MemoryError,
           pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # what damage raises below
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core.multiarray": "numpy.core.multiarray",
           "numpy._core.numeric": "numpy.core.numeric"}  # by Python 3 and NumPy 2
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "storage.Untyped": torch.uint8}.items()}
DTYPES = {str(dtype): dtype for dtype in (*STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
                                          torch.float8_e5m2)}
# Names of the standard library can do anything to a machine: those that hold data are let in as labels, others are an error.
DATA = re.compile(r"(collections(\.abc)?|typing|enum|pathlib(\._local)?|datetime)\.\w+|argparse\.Namespace|"
                  r"types\.SimpleNamespace|builtins\.(bool|dict|float|int|list|long|object|range|slice|str|tuple|type|unicode)")


@dataclass(eq=False, slots=True, repr=False)
class Inert:
    """What a pickle says about an object whose class was not executed, or (args None) about a class itself."""

    kind: str  # "module.name"
    args: tuple | None = None  # what its class was called with
    state: object = None  # what would have set its attributes, mostly a dict
    items: list | dict | None = None  # what was appended, or set by key

    def __repr__(self):
        return f"<Inert {'class ' if self.args is None else ''}{self.kind}>"


def check_keys(keys):
    """Hashing follows nested tuples on the C stack: a million of them crash the interpreter, and forty pairs take for ever."""
    if type(keys) not in (list, tuple):
        raise ValueError(f"a {type(keys).__name__} is used as a list of keys")
    for key in keys:
        if isinstance(key, (tuple, frozenset)) and any(isinstance(part, (tuple, frozenset)) for part in key):
            raise ValueError("it has nested tuples as a key")
    return keys


def as_dict(*args):
    """OrderedDict(pairs), defaultdict(factory, pairs), Counter(counts) -> dict."""
    pairs = args[-1] if args and type(args[-1]) in (list, dict) else {}
    return pairs if type(pairs) is dict else alternating([part for key, value in pairs for part in (key, value)])


def alternating(items):
    """[key, value, key, value, ...] -> dict."""
    return dict(zip(check_keys(items[::2]), items[1::2], strict=True))


def as_bytes(data=b"", encoding="latin1"):
    """bytes; those of Python 2, and of protocols < 3, arrive as text of 256 characters."""
    if type(data) is str and encoding in ("latin1", "latin-1"):
        return data.encode("latin1")
    if type(data) not in (bytes, bytearray):
        raise ValueError(f"bytes are made of a {type(data).__name__}")
    return bytes(data)


def as_object(cls, base, value):
    """Objects of protocols 0 and 1; value: what the built-in base class held."""
    has_items = type(value) in (list, dict)
    return Inert(cls.kind, () if has_items or value is None else (value,), items=value if has_items else None)


def sizes(values):
    if type(values) not in (tuple, list) or len(values) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError("a shape, stride or offset is not made of numbers from 0 to 2**63")
    return tuple(values)


def as_dtype(value):
    """A dtype arrives as Inert("numpy.dtype", args=("f4", ...), state=(3, "<", ...)), the byte order being in the state."""
    code = value.args[0] if value.kind == "numpy.dtype" else value.kind
    if not re.fullmatch(r"[biufc]\d{1,2}|[SU]\d{1,9}|O8?", code):
        raise ValueError(f"an array is of type {code}")
    return np.dtype(code).newbyteorder(value.state[1])


def as_array(data, dtype, shape, order="C", axes=None):
    """Bytes or list of objects -> a new array. order "K": its axes were stored in the order that `axes` undoes."""
    dtype, shape = as_dtype(dtype), sizes(shape)
    if dtype.hasobject and any(type(item) is np.ndarray and item.dtype.hasobject for item in data):
        raise ValueError("an array of objects holds another")  # freeing a long chain of them overflows the C stack
    array = np.fromiter(data, dtype, len(data)) if dtype.hasobject else np.frombuffer(data, dtype)
    array = array.reshape(shape, order="C" if order == "K" else order)  # raises where the size differs
    return (array if axes is None else array.transpose(sizes(axes))).copy(order="K")


def as_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a storage. Views with more elements than their storage are refused: stride 0 could make them any size."""
    size, stride, (offset,) = sizes(size), sizes(stride), sizes([offset])
    if not isinstance(storage, torch.Tensor) or metadata:  # metadata: lazily conjugated or negated
        raise ValueError("a tensor is no plain view of a storage, as torch.save writes it")
    count, span = math.prod(size), sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if max(count, offset + (span if count else 0)) > storage.numel():
        raise ValueError(f"a tensor of shape {size}, strides {stride}, offset {offset} leaves its storage of {storage.numel()}")
    return storage.as_strided(size, stride, offset)


OURS = {
    "torch._utils._rebuild_tensor": as_tensor,
    "torch._utils._rebuild_tensor_v2": as_tensor,
    # v3 is for dtypes without a class of storages: the storage is of bytes, and the dtype comes as an argument
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None:
        as_tensor(storage.view(dtype), offset, size, stride, metadata=metadata),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": sizes,
    "numpy.core.multiarray.scalar": lambda dtype, data: as_array(as_bytes(data), dtype, ()).item(),
    "numpy.core.numeric._frombuffer": lambda data, *how: as_array(as_bytes(data), *how),
    "_codecs.encode": as_bytes,
    "collections.OrderedDict": as_dict, "collections.defaultdict": as_dict, "collections.Counter": as_dict,
    "copyreg._reconstructor": as_object,
    "builtins.bytes": as_bytes, "builtins.bytearray": lambda *data: bytearray(as_bytes(*data)), "builtins.complex": complex,
    "builtins.set": lambda items=(): set(check_keys(items)), "builtins.frozenset": lambda items=(): frozenset(check_keys(items)),
}


class Unpickler(pickle._Unpickler):
    """The machine in pure Python. Every instruction that looks up, calls or reaches into an object is replaced.

    file: of `size` bytes; fetch: function of key and bytes to a storage, where the pickle is torch's.
    """
    def __init__(self, file, size, fetch=None):
        super().__init__(file, encoding="latin1")  # Python 2's strings may be the bytes of arrays: as_bytes turns them back
        self.file, self.fetch, self.storages = file, fetch, {}
        self.allowance = 8 * size + 2**16  # bytes; a genuine file makes one or two copies of what it has

    def load(self):
        self.memo = {}
        value = super().load()
        if self.stack or self.metastack:
            raise ValueError("it stops in the middle")
        return value

    def spend(self, values):
        """A small file can ask ten thousand times for a copy of the same large value."""
        self.allowance -= sum(len(value) for value in values if type(value) in (str, bytes, bytearray))
        self.allowance -= sum(8 * len(value) for value in values if type(value) in (list, tuple))
        if self.allowance < 0:
            raise ValueError("it asks for many times its own size")

    def find_class(self, module, name):
        kind = f"{RENAMED.get(module, module)}.{name}"
        if re.search(r"joblib\.numpy_pickle(_compat)?\.Z?NDArrayWrapper$", kind):
            raise ValueError("its arrays are in other files beside it; where those are, joblib.load it and joblib.dump it again")
        if kind.partition(".")[0] in sys.stdlib_module_names and kind not in OURS and not DATA.fullmatch(kind):
            raise ValueError(f"it asks for {kind}, which has no place in a checkpoint; nothing was executed")
        return DTYPES.get(kind) or Inert(kind)

    def make(self, name, args, keywords=None):
        """Every call in a pickle comes through here."""
        if type(name) is not Inert or name.args is not None or type(args) is not tuple:
            raise ValueError(f"it calls a {type(name).__name__}")
        if name.kind not in OURS:
            return Inert(name.kind, (*args, keywords) if keywords else args)
        self.spend(args)
        return OURS[name.kind](*args)

    def persistent_load(self, pid):
        """("storage", class, key, device, number of elements [, None]) -> the storage as a tensor of one dimension."""
        if self.fetch is None or type(pid) is not tuple or pid[0] != "storage" or type(pid[2]) is not str or any(pid[5:]):
            raise ValueError("it refers to something outside of it that is no storage")
        dtype, key, (count,) = STORAGES[pid[1].kind], pid[2], sizes(pid[4:5])
        if key not in self.storages:
            self.storages[key] = self.fetch(key, count * dtype.itemsize).view(dtype)
        if self.storages[key].nbytes != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {self.storages[key].nbytes} bytes, not {count} of {dtype}")
        return self.storages[key].view(dtype)

    def build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:
            return  # the attributes of an OrderedDict, e.g. _metadata of a state dict, are dropped
        if type(target) is not Inert or target.args is None:
            raise ValueError(f"it sets attributes of a {type(target).__name__}")
        target.state = state
        if target.kind == "numpy.core.multiarray._reconstruct":
            *_, shape, dtype, fortran, data = state
            self.spend(state)
            data = data if type(data) is list else as_bytes(data)
            self.replace(target, as_array(data, dtype, shape, "F" if fortran else "C"))
        elif target.kind.endswith("joblib.numpy_pickle.NumpyArrayWrapper"):
            self.replace(target, self.joblib_array(**state))

    def replace(self, target, value):
        """An array exists only now, but later mentions of it look in the memo, where it was noted before its content."""
        self.stack[-1] = value
        for i in reversed(self.memo):
            if self.memo[i] is target:
                self.memo[i] = value
                break

    def joblib_array(self, dtype, shape, order, numpy_array_alignment_bytes=None, **_):
        """The array that follows in the file; joblib >= 1.2 puts some padding and, in one byte, its length before it."""
        if as_dtype(dtype).hasobject:
            nested = copy.copy(self)  # a pickle of its own follows
            array, self.allowance = nested.load(), nested.allowance
            return array
        if numpy_array_alignment_bytes is not None:
            self.file.read(self.file.read(1)[0])
        return as_array(self.file.read(math.prod(sizes(shape)) * as_dtype(dtype).itemsize), dtype, shape, order)

    def add(self, container, items):
        """Items for what is on top of the stack: a container of that type, or an Inert, which gets one."""
        target = self.stack[-1]
        if type(target) is Inert and target.args is not None:
            target.items = container() if target.items is None else target.items
            target = target.items
        if type(target) is not container:
            raise ValueError(f"it adds items to a {type(target).__name__}")
        target.extend(items) if container is list else target.update(items)

    def push(self, value):
        self.append(value)  # looked up only now: taking items off changes which stack it belongs to

    def refuse(self):
        raise ValueError("it has an instruction that no checkpoint has")

    dispatch = {**dict.fromkeys(range(256), refuse), **pickle._Unpickler.dispatch, **{code[0]: method for code, method in {
        **dict.fromkeys([pickle.REDUCE, pickle.NEWOBJ], lambda self: self.push(self.make(self.stack.pop(-2), self.stack.pop()))),
        pickle.NEWOBJ_EX: lambda self: self.push(self.make(self.stack.pop(-3), self.stack.pop(-2), self.stack.pop())),
        pickle.BUILD: build,
        pickle.APPEND: lambda self: self.add(list, [self.stack.pop()]),
        pickle.APPENDS: lambda self: self.add(list, self.pop_mark()),
        pickle.ADDITEMS: lambda self: self.add(set, check_keys(self.pop_mark())),
        pickle.FROZENSET: lambda self: self.push(frozenset(check_keys(self.pop_mark()))),
        pickle.SETITEM: lambda self: self.add(dict, alternating([self.stack.pop(-2), self.stack.pop()])),
        pickle.SETITEMS: lambda self: self.add(dict, alternating(self.pop_mark())),
        pickle.DICT: lambda self: self.push(alternating(self.pop_mark())),
        # the original allocates before it reads
        pickle.BYTEARRAY8: lambda self: self.push(bytearray(self.read(*struct.unpack("<Q", self.read(8))))),
        **dict.fromkeys([pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER,
                         pickle.READONLY_BUFFER], refuse),  # old classes of Python 2, process-wide registries, other files
    }.items()}}


def zip_members(file, size):
    """{name: zipfile.ZipInfo}. Nothing is extracted; names that would lead elsewhere tell of an attack all the same."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    members = {entry.filename: entry for entry in entries}
    for name in members:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:[/\\]", name):
            raise ValueError(f"its member {name!r} points out of the archive")
    if len(members) < len(entries) or sum(entry.file_size for entry in entries) > size:
        raise ValueError("its members overlap")
    return members


def read_member(data, entry):
    """The bytes of a member as a view of the mapped file, their checksum verified."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"its member {entry.filename!r} is compressed, which torch never does")
    start = entry.header_offset
    start += 30 + sum(struct.unpack("<26xHH", data[start:start + 30]))  # a header, ending in the lengths of its name and extras
    content = memoryview(data)[start:start + entry.file_size]
    if len(content) != entry.file_size or zlib.crc32(content) != entry.CRC:
        raise ValueError(f"the checksum of its member {entry.filename!r} is wrong")
    return content


def read_zip(data, file):
    """torch >= 1.6 -> (value, what the pickle was read from)."""
    members = zip_members(file, len(data))
    roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise ValueError("it is a zip archive without one data.pkl, so no torch file")
    root = roots[0]
    if root + "byteorder" in members and read_member(data, members[root + "byteorder"]) != b"little":
        raise ValueError("it was written by a big-endian machine")

    def fetch(key, size):
        flat = torch.from_numpy(np.frombuffer(read_member(data, members[f"{root}data/{key}"]), np.uint8))
        return flat.clone() if flat.data_ptr() % 16 else flat  # 16: the largest element, complex128

    pickled = bytes(read_member(data, members[root + "data.pkl"]))
    source = io.BytesIO(pickled)
    return Unpickler(source, len(pickled), fetch).load(), source


def read_legacy(machine, room):
    """torch < 1.6, after the magic number. The bytes come last, so that tensors are made empty and filled in place."""
    def fetch(key, size):
        nonlocal room
        room -= size
        if room < 0:
            raise EOFError("it promises more bytes than it has")
        return torch.empty(size, dtype=torch.uint8)

    version, system = machine.load(), machine.load()
    if version != 1001 or type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("it is of an unknown version, or was written by a big-endian machine")
    machine.fetch = fetch
    value, keys = machine.load(), machine.load()
    if type(keys) is not list or sorted(keys) != sorted(machine.storages):
        raise ValueError("its storages are not those that its tensors ask for")
    for key in keys:
        storage = machine.storages[key]
        if struct.unpack("<q", machine.file.read(8)) != (len(storage),):
            raise ValueError(f"storage {key} has another size than its tensors ask for")
        content = machine.file.read(storage.nbytes)
        if len(content) != storage.nbytes:  # a single byte would be broadcast
            raise EOFError("it ends within a storage")
        storage.view(torch.uint8).numpy()[:] = np.frombuffer(content, np.uint8)
    return value


def decompress(data):
    """A compressed joblib file -> (its content as a file, size); of any other, what was given."""
    old = data[:2] == b"ZF"  # joblib <= 0.9: 19 characters of length precede the zlib stream, and one more by Python 2
    if old or data[:1] == b"\x78" or data[:2] == b"\x1f\x8b":  # none of these beginnings is that of a pickle
        tool = zlib.decompressobj(47)  # 47: zlib's or gzip's header and checksum
    elif data[:3] == b"BZh":
        tool = BZ2Decompressor()
    elif data[:6] == b"\xfd7zXZ\0" or data[:3] == b"\x5d\0\0":
        tool = lzma.LZMADecompressor(memlimit=128 * 1024**2)  # the strongest preset needs 65 MiB, a lie could ask for 4 GiB
    else:
        return data, len(data)
    content = io.BytesIO()
    for at in range(21 + (data[21:22] == b" ") if old else 0, len(data), PIECE):
        if tool.eof or content.tell() > LARGEST:
            raise ValueError(f"it goes on after its end, or becomes more than {LARGEST} bytes when decompressed")
        content.write(tool.decompress(data[at:at + PIECE], STEP))
        while not tool.eof and not getattr(tool, "needs_input", True) and content.tell() <= LARGEST:
            content.write(tool.decompress(b"", STEP))
    size = content.tell()
    if not tool.eof or tool.unused_data or old and int(data[2:21], 16) != size:
        raise EOFError("its compressed content does not end where the file ends")
    content.seek(0)
    return content, size


def read(file):
    """ACCESS_COPY: tensors of a zip are views of the file; writing to them changes the memory and not the file."""
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if data[:4] == b"PK\3\4":
        value, source = read_zip(data, file)
    else:
        if data[8:9] == b"{":
            raise ValueError("it is a safetensors file: a model in it is given as the folder that holds its config.json")
        if data[-1:] != b"." and re.fullmatch(rb"[\t\n\r -~]+", data[:512]):  # every pickle ends in a full stop
            raise ValueError("it is a text")
        source, size = decompress(data)
        machine = Unpickler(source, size)
        value = machine.load()
        if type(value) is int and value == MAGIC:
            value = read_legacy(machine, size)
    if source.read(1):
        raise ValueError("it goes on after its end")
    return value


def load(path):
    """What a torch file (of either form), a joblib dump or a pickle holds; nothing in it is executed.

    Args: path: of the file. It must stay as it is while the tensors are used: they may be views of it.
    Returns: dict (ordered ones and their like too), list, tuple, set, str, bytes, numbers (NumPy's become Python's), None;
        torch.Tensor, dtype as stored, without gradient (of parameters too); torch.dtype; numpy.ndarray;
        Inert for everything else, among them numpy.dtype, torch.device and classes.
    Raises: FileNotFoundError; ValueError naming file and reason: for damage, for names of the standard library that do more
        than hold data, for calls of anything but names, and for lengths and views that the file does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; the download or copy is incomplete")
    with open(path, "rb") as file:
        try:
            return read(file)
        except DAMAGED as error:
            reason = str(error).partition("\n")[0][:300]
            said = isinstance(error, (ValueError, EOFError)) and re.match(r"(its?|an?|the|bytes|storage) ", reason)  # ours
            reason = reason if said else f"it is damaged, or no pickle: {type(error).__name__}"
    raise ValueError(f"{path} cannot be opened as plain data ({reason}); download it again, or convert it to safetensors where "
                     "you trust it")
