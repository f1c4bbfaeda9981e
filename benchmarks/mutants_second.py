SECOND = []
