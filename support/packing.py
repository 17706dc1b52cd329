"""Packing: sequences of any lengths into micro-batches of at most so many tokens, without padding, and such
that all ranks finish together.

    packs = pack(sequences, token_budget=9216, multiple_of=ranks, cost=flops_of_a_sequence)
    mine = packs[rank::ranks]                                  # dealt like cards

To copy: this file. It needs the standard library alone; a sequence is whatever has a length.
"""
import heapq
import math


def karmarkar_karp(costs, k):
    """Indices of `costs` in k lists whose sums differ little: the largest differencing method, k-way
    (https://en.wikipedia.org/wiki/Largest_differencing_method).

    A partition is k parts, each a sum with its indices. At first every item is a partition by itself, all
    other parts empty. Of all partitions, the two with the widest spread, largest sum less smallest, are
    merged, large sums with small ones, until one is left:

        8, 7, 6, 5, 4, k = 2    8 and 7 have the widest spreads    ->  (8 | 7)
        (8 | 7), 6, 5, 4        6 and 5                            ->  (6 | 5)
        (8 | 7), (6 | 5), 4     4 and (8 | 7): 4 joins the 7       ->  (11 | 8)
        (11 | 8), (6 | 5)       11 with 5, 8 with 6                ->  (16 | 14)

    >>> karmarkar_karp([8, 7, 6, 5, 4], 2)                 # each to the lightest list would end at 17 and 13
    [[4, 1, 3], [0, 2]]
    """
    def total(part):
        return part[0]

    # (-spread, number, parts): the widest spread comes first, and number breaks ties. Parts are stored with
    # the largest sum first, and not while they are empty.
    heap = [(-cost, i, [(cost, [i])]) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    for number in range(len(costs), 2 * len(costs) - 1):
        _, _, left = heapq.heappop(heap)
        _, _, right = heapq.heappop(heap)
        # Together they have room for k parts. What is too many shares one: of the small parts of both sides,
        # the largest of the left with the smallest of the right.
        shared = max(0, len(left) + len(right) - k)
        left, left_small = left[:len(left) - shared], left[len(left) - shared:]
        right, right_small = right[:len(right) - shared], right[len(right) - shared:]
        parts = left + right
        for (cost, indices), (other_cost, other_indices) in zip(left_small, reversed(right_small)):
            parts.append((cost + other_cost, indices + other_indices))
        parts.sort(key=total, reverse=True)
        smallest = parts[-1][0] if len(parts) == k else 0
        heapq.heappush(heap, (smallest - parts[0][0], number, parts))

    parts = heap[0][2] if heap else []
    empty = [[] for _ in range(k - len(parts))]
    return [indices for _, indices in parts] + empty


def first_fit(tokens, token_budget):
    """Indices of `tokens` in lists that keep the budget: the longest first, each to the first list with room.

    >>> first_fit([3, 7, 4, 6], 10)
    [[1, 0], [3, 2]]
    """
    def length(i):
        return tokens[i]

    lists, used = [], []
    for i in sorted(range(len(tokens)), key=length, reverse=True):
        number = 0
        while number < len(lists) and used[number] + tokens[i] > token_budget:
            number += 1
        if number == len(lists):
            lists.append([])
            used.append(0)
        lists[number].append(i)
        used[number] += tokens[i]
    return lists


def pack(sequences, token_budget, multiple_of=1, cost=len):
    """Distribute sequences over micro-batches of at most `token_budget` tokens.

    Returns a list of lists; every sequence appears once. Their number is what first-fit needs, rounded up to
    a multiple of `multiple_of` (the ranks), so that rank r trains on micro-batches r, r + ranks, ...; some
    may be empty. Those of one round run side by side, and all ranks wait for the costliest: of the
    distributions that keep the budget (Karmarkar-Karp on costs, on tokens, first-fit) the one with the
    shortest rounds is taken. cost: of a sequence; the training loop passes FLOPs, in which attention is
    quadratic. Raises ValueError when one sequence alone is over the budget.
    """
    tokens = [len(sequence) for sequence in sequences]
    costs = [cost(sequence) for sequence in sequences]
    if tokens and max(tokens) > token_budget:
        raise ValueError(f"a sequence of {max(tokens)} tokens exceeds --micro_batch_tokens {token_budget}")

    def cost_of(part):
        return sum(costs[i] for i in part)

    fitted = first_fit(tokens, token_budget)
    # Every rank runs as many as the others, at least one: a forward and a backward are collectives.
    count = max(1, math.ceil(len(fitted) / multiple_of)) * multiple_of
    while len(fitted) < count:
        fitted.append([])

    best, shortest = None, math.inf
    for parts in (karmarkar_karp(costs, count), karmarkar_karp(tokens, count), fitted):
        if max(sum(tokens[i] for i in part) for part in parts) > token_budget:
            continue                              # evened out over the budget; first-fit always keeps it
        # Costliest first, so that like runs beside like: a round lasts as long as its first micro-batch.
        parts.sort(key=cost_of, reverse=True)
        duration = sum(cost_of(part) for part in parts[::multiple_of])
        if duration < shortest:
            best, shortest = parts, duration

    packs = []
    for part in best:
        packs.append([sequences[i] for i in sorted(part)])
    return packs
