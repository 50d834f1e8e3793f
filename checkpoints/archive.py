"""What folders and zip archives of strangers hold; of archives, a model's -> a folder, whole or not at all; any other in place.

    NAME.zip --every member's name, kind and size looked at first--> NAME.tmp/ --all bytes written, checksums right--> NAME/
    NAME.zip/folder/a.wav --open_file--> the bytes of that member, checksum right; of any other path, the file
    folder --walk--> every file below it, through links too, each real folder once

An archive may lie: names that lead out of the folder, links, members larger than they declare. None of it is followed.
Sources: PKWARE's APPNOTE.TXT, section 4.4; the warnings in the documentation of Python's zipfile.
"""
import collections
import functools
import io
import itertools
import os
import re
import shutil
import stat
import sys
import zipfile
import zlib
from pathlib import Path

import config
from checkpoints.recognise import recognise

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError,
           RuntimeError)  # what zipfile raises for damage; RuntimeError: a password, or a method of packing that it has not
PIECE = 10_000  # names of one folder that walk holds at a time


def walk(root, seen=None):
    """Yields (folder, names of files in it) for a folder and all below it, linked ones too, each real folder once: a loop ends.

    What is hidden (a name that begins with a dot, and __MACOSX) is left out, pipes and devices too. Paths begin with root. Of
    a large folder come pieces of PIECE names. One below root that cannot be read is passed over, and said.

    Args: seen: set of the real folders that were given out already, by earlier calls too.
    """
    waiting, linked, seen = collections.deque([Path(root)]), collections.deque(), set() if seen is None else seen
    while waiting or linked:
        folder = (waiting or linked).popleft()  # a folder rather by its own name than by that of a link to it
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            folders = []
            with os.scandir(folder) as entries:  # it knows the kinds, so that no file is asked for its own
                shown = (entry for entry in entries if not entry.name.startswith((".", "__MACOSX")))
                while piece := [*itertools.islice(shown, PIECE)]:
                    inner = {entry.name for entry in piece if entry.is_dir(follow_symlinks=False)
                             or entry.is_symlink() and os.path.isdir(entry.path)}
                    folders += inner
                    yield folder, sorted(entry.name for entry in piece if entry.name not in inner
                                         and (entry.is_file(follow_symlinks=False) or entry.is_symlink()))
        except OSError as error:  # no permission, such as of lost+found
            if folder == Path(root):
                raise
            print(f"passed over: the folder {folder}, which cannot be read ({error.strerror.lower()})", file=sys.stderr)
            continue
        for name in sorted(folders):
            (linked if os.path.islink(folder / name) else waiting).append(folder / name)


def zip_of(path):
    """The archive that a path leads into, archive.zip/a.wav, and the member's name; None, None for any other path."""
    for folder in Path(path).parents:
        if folder.suffix.lower() == ".zip" and folder.is_file():
            return folder, Path(path).relative_to(folder).as_posix()
    return None, None


@functools.lru_cache(maxsize=16)
def open_zip(archive, changed):
    """An archive with its table of contents, kept open: an evaluation reads thousands of members. changed: its date."""
    return zipfile.ZipFile(archive)


def names_in(archive):
    """The names of all members, those of folders end in /. Raises ValueError."""
    try:
        return open_zip(archive, archive.stat().st_mtime_ns).namelist()
    except (*DAMAGED, OSError) as error:
        raise ValueError(f"{archive} {recognise(archive) or f'is no zip archive, or damaged ({error}); copy it again'}") from None


def open_file(path):
    """The bytes of a file, open for reading; those of a zip's member are held in memory. Raises OSError or ValueError."""
    archive, member = zip_of(path)
    if archive is None:
        return open(path, "rb")
    try:
        return io.BytesIO(open_zip(archive, archive.stat().st_mtime_ns).read(member))
    except KeyError:
        raise FileNotFoundError(f"no {member} in {archive}; check the path") from None
    except DAMAGED as error:
        raise ValueError(f"cannot read {member} in {archive} ({error}); copy or download it again") from None


def room_for(size, folder):
    """Raise OSError unless `size` more bytes fit."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{size / 1e9:.2f} GB are needed in {folder}, where {free / 1e9:.2f} GB are free; "
                      "delete something, or set NANOTWIST_HOME to a larger disk")


def unzip(archive, folder):
    """Unpack an archive from a stranger into a folder that does not exist yet; nothing is visible there before all is.

    Raises: ValueError for one that is damaged, reaches out of its folder or holds no model; OSError where the disk is too small.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; delete it to unpack {archive} again")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            check_members(members, archive)
            room_for(sum(member.file_size for member in members), temporary)
            for member in config.progress(members, desc=f"unpacking {archive.name}", unit="file"):
                unpack(file, member, temporary / member.filename)
        if not (model_folder(temporary) / "config.json").is_file():
            held = ", ".join(sorted(path.name for path in temporary.iterdir())[:5]) or "nothing"
            raise ValueError(f"{archive} holds {held}: expected config.json there or in exactly one folder below; check it")
        os.replace(temporary, folder)
    except DAMAGED as error:
        raise ValueError(f"{archive} {recognise(archive) or f'is damaged or no zip archive ({error}); get it again'}") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot unpack {archive} to {folder} ({error.strerror}); make room there or check the archive") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_members(members, archive):
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
        trouble = ("leads out of its folder" if member.filename.startswith("/") or ".." in member.filename.split("/")
                   else "has a backslash or colon in its name" if re.search(r"[\\:]", member.filename)
                   else "is a link or a device" if kind not in (0, stat.S_IFREG, stat.S_IFDIR)
                   else "is encrypted" if member.flag_bits & 1
                   else "is packed in an unusual way" if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                   else None)
        if trouble:
            raise ValueError(f"{archive}: {member.filename!r} {trouble}; this is no model archive, and nothing was unpacked")


def unpack(file, member, target):
    """One member; zipfile reads no more bytes than it declares, and compares their checksum."""
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open(member) as source, open(target, "xb") as out:  # x: no member twice
        shutil.copyfileobj(source, out)
        out.flush()
        os.fsync(out.fileno())
        if out.tell() != member.file_size:
            raise zipfile.BadZipFile(f"{member.filename} is shorter than declared")


def model_folder(folder):
    """The folder that holds config.json: this one, or the only one in it that does, as archives are often packed."""
    nested = [] if (folder / "config.json").is_file() else list(folder.glob("*/config.json"))
    return nested[0].parent if len(nested) == 1 else folder
