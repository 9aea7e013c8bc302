def page(*a): return ""
def plots(*a): pass
