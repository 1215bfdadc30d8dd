"""The format of log segments, and of manifests, which are framed alike. Writer and reader own no byte of it.

Grammar (integers are little-endian; crc is crc32c):

    file          = header group* reserve
    reserve       = 0:u8*                          only in the last segment: space taken before it is written
    header        = magic[8] format:u32 store_id[16] number:u64 previous_number:u64 previous_end:u64 crc:u32
                    crc covers the header's bytes before it
    group         = magic:u32 payload_bytes:u32 hlc:u64 synced_offset:u64 payload_crc:u32 header_crc:u32 payload
                    payload_crc covers the payload; header_crc covers place, then the group header's bytes before it
    place         = number:u64 offset:u64          number of the file, offset of the group in it; not written
    payload       = msgpack array of entries (entries.py; manifest.py for a manifest), or nothing in a sync mark

Why it is so:
  - Header and payload have checksums of their own: a damaged length is never believed, and one bad payload does not
    hide the groups behind it.
  - The header checksum covers the place: a group that lies where it was not written (a doubled or stale disk block)
    is not a group.
  - `synced_offset` says how much of this file was on disk when the group was written. Bytes below it can be damaged,
    but never "not written yet": this is how a torn tail and a damaged file are told apart.
  - A sync mark is a group without payload, appended after a sync when nothing else comes for a moment, so that the
    last group of a quiet log is covered too.
  - `previous_number` and `previous_end` chain the segments: the previous segment is valid up to `previous_end`, and
    what it may hold past it is void. 0 and 0 in the first segment, and always in a manifest.
  - The last segment may be longer than what was written to it, since a sync is cheaper when it need not make a new
    length durable. No group begins with zeros, so a reader knows the end; a clean close cuts the reserve off.
  - A file gets its header before it gets its name (written as *.tmp, synced, renamed), so a bad header is never torn.
  - `hlc` is a hybrid clock reading (milliseconds since 1970 << 16 | counter), rising from group to group.

Magic numbers and the layout are on disk: never renumber. A change of layout is a new format version.

Worked example: segment 2 of the store 000102...0f, after segment 1 that ends at 56, with one write (tablet 1, term 1,
seqno 7, no token, put "k" = "v") at clock 0x0000000100000000, then the sync mark that covers it:

    0000  73 68 6b 76 6c 6f 67 0a 01 00 00 00 00 01 02 03   header
    0010  04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 02 00 00 00
    0020  00 00 00 00 01 00 00 00 00 00 00 00 38 00 00 00
    0030  00 00 00 00 34 b1 84 1e
    0038  5e 1d c0 b7 11 00 00 00 00 00 00 00 01 00 00 00   group
    0048  38 00 00 00 00 00 00 00 cd ef cb bf 0b cb d5 8b
    0058  91 99 01 01 01 07 c0 91 c4 01 6b 01 00 91 c4 01
    0068  76
    0069  5e 1d c0 b7 00 00 00 00 01 00 00 00 01 00 00 00   mark
    0079  69 00 00 00 00 00 00 00 00 00 00 00 69 af e1 0c
"""

from __future__ import annotations

import struct

LOG_MAGIC = b"shkvlog\n"
MANIFEST_MAGIC = b"shkvman\n"
FORMAT_VERSION = 1

GROUP_MAGIC = 0xB7C01D5E
GROUP_MAGIC_BYTES = GROUP_MAGIC.to_bytes(4, "little")

PAYLOAD_BYTES_MAX = 1 << 30
"""A group is never longer. Callers form far smaller ones."""

HEADER = struct.Struct("<8sI16sQQQ")
HEADER_CRC = struct.Struct("<I")
HEADER_BYTES = HEADER.size + HEADER_CRC.size

GROUP = struct.Struct("<IIQQI")
GROUP_CRC = struct.Struct("<I")
WHOLE_GROUP = struct.Struct("<IIQQII")
"""GROUP and GROUP_CRC in one."""
GROUP_BYTES = WHOLE_GROUP.size

PLACE = struct.Struct("<QQ")
PLACED_GROUP = struct.Struct("<QQIIQQI")
"""PLACE and GROUP in one: what `header_crc` covers."""

NO_SEGMENT = 0
"""Segments are numbered from 1."""
