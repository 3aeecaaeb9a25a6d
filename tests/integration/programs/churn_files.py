"""Writes files all the time, and compares them with what it has written."""

import os
import random

os.makedirs("/churn")
believed = {}
log = open("/churn.log", "a")
number = 0
while True:
    number += 1
    name = f"/churn/{random.randrange(40)}"
    if name in believed and random.random() < 0.3:
        os.unlink(name)
        del believed[name]
    elif name in believed and random.random() < 0.5:
        with open(name, "a") as file:
            file.write(f"{number}\n")
        believed[name] += f"{number}\n"
    else:
        believed[name] = f"{number}\n" * 500
        with open(name + ".new", "w") as file:
            file.write(believed[name])
        os.rename(name + ".new", name)
    print(number, file=log, flush=True)
    if number % 200 == 0:
        found = {f"/churn/{name}": open(f"/churn/{name}").read() for name in os.listdir("/churn")}
        print("same" if found == believed else "DIFFERENT", number, flush=True)
