"""The client library: one core without I/O under two faces, `Client` (sync.py) and `AsyncClient` (aio.py).

arguments.py  what users pass, as bytes          connection.py  one blocking connection
calls.py      one request and its fate           pool.py        connections shared by threads
requests.py   user operations as calls           backoff.py     how long to pause before trying again
scan.py       pages of an ordered scan
"""
