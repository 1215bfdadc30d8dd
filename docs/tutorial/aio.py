import asyncio

from shardkv import AsyncClient


async def main():
    async with AsyncClient("127.0.0.1:7400") as db:
        await asyncio.gather(*(db.put(f"task:{number}", "done") for number in range(100)))
        print([key async for key in db.scan(prefix="task:9", keys_only=True, limit=3)])


asyncio.run(main())
