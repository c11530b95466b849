"""The system's zlib beside Paddle 2.6, which would make it fail.

Paddle 2.6's libpaddle.so has a zlib of its own, exports its functions, and is linked with the
system's libz.so.1. If libz.so.1 is loaded only then, its calls of its own functions go to those of
libpaddle.so, which keep their state in another layout: reading a PNG fails, writing one crashes.
All is well if libz.so.1 was loaded first, so this package imports Python's `zlib` before anything
else. Where Paddle was imported before this package, `restore` undoes the harm.
"""

import ctypes
import platform
import struct
import sys

_PAGE_BYTES = 4096
_RTLD_NOLOAD = 4
_READ_WRITE = 3  # PROT_READ | PROT_WRITE

# Entries of a dynamic section (ELF), and the relocations that bind a function on x86-64.
_SYMTAB, _RELA, _RELA_BYTES, _JMPREL, _JMPREL_BYTES = 6, 7, 8, 23, 2
_GLOB_DAT, _JUMP_SLOT = 6, 7
_SYMBOL_BYTES = 24


class _LinkMap(ctypes.Structure):
    """The start of glibc's `struct link_map`: what a library's handle points to."""

    _fields_ = [("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t)]


class _SymbolInfo(ctypes.Structure):
    """glibc's `Dl_info`."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def restore() -> int:
    """Bind the functions of libz.so.1 that are bound to libpaddle.so to its own again.

    Returns:
        How many there were: 0 where nothing is wrong, and on other systems than Linux on x86-64,
        for which there is no Paddle 2.6 that does this.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return 0
    try:
        library = ctypes.CDLL("libz.so.1", mode=_RTLD_NOLOAD)
    except OSError:  # not loaded: nothing is bound yet
        return 0
    process = ctypes.CDLL(None)
    restored = 0
    for slot, own in _own_functions(_LinkMap.from_address(library._handle)):
        bound = ctypes.c_size_t.from_address(slot)
        if bound.value == own or b"libpaddle" not in _file_of(process, bound.value):
            continue
        page = slot - slot % _PAGE_BYTES  # a slot is aligned: it does not cross pages
        process.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE_BYTES), _READ_WRITE)
        bound.value = own
        restored += 1
    return restored


def _own_functions(library: _LinkMap):
    """(address of the slot, address of the function) for each own function a library calls."""
    entries = {}
    position = library.dynamic
    while True:
        tag, value = struct.unpack("qQ", ctypes.string_at(position, 16))
        if tag == 0:
            break
        entries[tag] = value
        position += 16
    tables = ((_RELA, _RELA_BYTES), (_JMPREL, _JMPREL_BYTES))
    for table, size in ((entries.get(a, 0), entries.get(b, 0)) for a, b in tables):
        for slot, info, _ in struct.iter_unpack("QQq", ctypes.string_at(table, size)):
            if info & 0xFFFFFFFF not in (_GLOB_DAT, _JUMP_SLOT):
                continue
            symbol = entries[_SYMTAB] + _SYMBOL_BYTES * (info >> 32)
            _, _, _, section, value, _ = struct.unpack(
                "IBBHQQ", ctypes.string_at(symbol, _SYMBOL_BYTES)
            )
            if section != 0:  # defined in this library
                yield library.base + slot, library.base + value


def _file_of(process: ctypes.CDLL, address: int) -> bytes:
    """The file of the library that `address` is in; empty if in none."""
    info = _SymbolInfo()
    found = process.dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    return (info.file or b"") if found else b""
