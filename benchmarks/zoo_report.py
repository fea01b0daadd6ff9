def summary(r): 
    from collections import Counter
    return str(Counter(x.get("failed","ok") for x in r.values()))
