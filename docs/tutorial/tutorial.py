import json

from shardkv import Client

with Client("127.0.0.1:7400") as db:
    db.put_many({"user:1001": "Alice", "user:1002": "Bob"})
    print(db.get_many(["user:1001", "nope"]))

    iceland = list(db.scan(prefix="city:IS:"))
    print(len(iceland), "cities in Iceland, the first is", iceland[0][0].decode())

    border = [key.decode() for key in db.scan("city:IS:", "city:IT:Ac", keys_only=True)]
    print(len(border), "keys from", border[0], "to", border[-1])

    japan = [json.loads(city) for _, city in db.scan(prefix="city:JP:")]
    print("largest in Japan:", max(japan, key=lambda city: city["population"])["name"])

    with db.batch() as batch:  # all or nothing, shard by shard
        batch.put("{order:7}:state", "paid")  # keys with the same {tag} share a shard
        batch.delete("{order:7}:cart")
    print(db.get("{order:7}:state"))
