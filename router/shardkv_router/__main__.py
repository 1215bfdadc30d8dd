"""`python -m shardkv_router run ...`: the router program."""

from shardkv_router.command import router

if __name__ == "__main__":
    router(prog_name="shardkv router")
