"""What a language-model head says of each token, without ever holding its logits.

    logp, entropy = token_logprobs(hidden, head.weight, targets)      # (N,D), (V,D), (N,) -> (N,), (N,) nats
    kl = token_kl(hidden, head.weight, base_hidden, base_head.weight)                             # (N,) nats

All that the paper's equations ask of a model: log pi_theta(y_t | x, y_<t) (Eq. 1-13), the entropy H_t of the
same distribution (the weights of Eq. 8 and 12), and KL(pi_theta || pi_base) (Eq. A1).

The logits of 9,216 packed tokens over Qwen2.5-Math-7B's vocabulary of 152,064 are 5.6 GB in fp32, and
their softmax is as much again. So both functions go through the tokens in chunks: the forward keeps one or
two numbers of each token, and the backward computes each chunk's logits a second time.

To copy: this file. It needs torch alone.

Letters: N tokens, V vocabulary, D hidden size.
"""
import torch


def default_chunk(vocabulary):
    """Tokens of a chunk: 1024, or fewer where two (chunk, V) fp32 blocks would take more than 1 GiB.

    A multiple of 128, the height of a tile in the GPU's matrix products.

    >>> default_chunk(152_064)                 # two blocks of 768 x 152,064 x 4 bytes = 0.47 GB each
    768
    """
    fits = 2**27 // vocabulary                          # 2 blocks x 4 bytes x fits x V are at most 1 GiB
    return min(1024, max(128, fits // 128 * 128))


def _addmm_fp32(out, left, right, beta=1.0, alpha=1.0):
    """out = beta * out + alpha * left @ right, in place; out is fp32 whatever left and right are.

    A result in bf16, which has 8 bits, would round logits near 20 to steps of 0.125: log-probs by up to 0.06.
    """
    if not left.is_cuda or left.dtype == torch.float32:
        out.addmm_(left.float(), right.float(), beta=beta, alpha=alpha)
    elif beta:                                     # one kernel: neither a rounded product nor a copy of it
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
        if alpha != 1:
            out.mul_(alpha)


class _ChunkedLogProbs(torch.autograd.Function):
    """Log-probs and entropies of N tokens. Of each, with its logits l (V,), p = softmax(l) and target y:

        log Z   = log sum_v exp(l_v)                  d log p_y / d l_v = 1[v = y] - p_v      (Eq. 4, A9)
        log p_y = l_y - log Z
        H       = -sum_v p_v log p_v                  d H / d l_v       = -p_v (log p_v + H)
                = log Z - sum_v p_v l_v

    The forward keeps log Z and H. All chunks write to the same (chunk, V) blocks: on a CPU, a fresh block
    costs more time in page faults than softmax takes on it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, entropy_grad):
        """hidden (N,D), weight (V,D), targets (N,) -> log p of the targets and H, (N,) each."""
        logp = hidden.new_empty(len(hidden), dtype=torch.float32)                                       # (N,)
        log_z = torch.empty_like(logp)
        entropy = torch.empty_like(logp)
        blocks = hidden.new_empty(2, min(chunk, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            logits, probs = blocks[:, :rows.stop - start]                                  # (chunk, V) each
            _addmm_fp32(logits, hidden[rows], weight.T, beta=0, alpha=1 / temperature)
            torch.softmax(logits, -1, out=probs)
            # softmax divides exp(l - max l) by a sum of its own, S. So its largest entry is 1 / S, and log Z
            # is max l + log S: no second pass of exponentials. S was rounded; by how much, `total` tells.
            total = probs.sum(-1)                                                                  # (chunk,)
            log_z[rows] = logits.amax(-1) + (total / probs.amax(-1)).log_()
            logp[rows] = logits.gather(-1, targets[rows, None])[:, 0] - log_z[rows]
            mean_logit = probs.mul_(logits).sum(-1) / total                              # sum_v p_v l_v
            entropy[rows] = log_z[rows] - mean_logit
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.temperature, ctx.chunk, ctx.entropy_grad = temperature, chunk, entropy_grad
        if not entropy_grad:
            # As Eq. 8 and 12 want their weights: without gradient, whoever uses them.
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        """Gradients of a loss with respect to the two, (N,) each -> to hidden (N,D) and weight (V,D)."""
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # Every chunk adds to all of it: in bf16, most of what is added would be rounded away.
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)                              # (V, D)
        blocks = hidden.new_empty(1 + ctx.entropy_grad, min(ctx.chunk, len(hidden)), len(weight),
                                  dtype=torch.float32)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, min(start + ctx.chunk, len(hidden)))
            log_probs = blocks[0, :rows.stop - start]                                           # (chunk, V)
            _addmm_fp32(log_probs, hidden[rows], weight.T, beta=0, alpha=1 / ctx.temperature)
            log_probs.sub_(log_z[rows, None])

            # With a = dL / d log p_y and b = dL / d H, the formulas above give
            #     dL / d l_v = a (1[v = y] - p_v) - b p_v (log p_v + H) = p_v factor_v + a 1[v = y]
            #     factor_v   = -b (log p_v + H) - a
            # Both are divided by the temperature, as l = hidden @ weight.T / temperature.
            of_logp = grad_logp[rows, None] / ctx.temperature                                     # (chunk, 1)
            factor = -of_logp
            if ctx.entropy_grad:
                of_entropy = grad_entropy[rows, None] / ctx.temperature
                factor = blocks[1, :rows.stop - start]
                torch.add(log_probs, entropy[rows, None], out=factor).mul_(-of_entropy).sub_(of_logp)
            # From here on the block of log-probs holds p, then dL / dl.
            grad_logits = log_probs.exp_().mul_(factor).scatter_add_(-1, targets[rows, None], of_logp)
            grad_logits = grad_logits.to(hidden.dtype)

            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                _addmm_fp32(grad_weight, grad_logits.T, hidden[rows])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def token_logprobs(hidden, head_weight, targets, temperature=1.0, chunk=None, entropy_grad=False):
    """log softmax(hidden @ head_weight.T / temperature)[targets] and the entropy of that softmax.

    hidden (N,D), head_weight (V,D), targets (N,) int64 -> logp (N,) with gradient, entropy (N,); nats,
    fp32. The entropy has no gradient unless `entropy_grad` (an entropy bonus). Whatever N is, memory beyond
    inputs and gradients peaks at two (chunk, V) fp32 blocks; `chunk` is default_chunk(V) tokens unless given.
    The gradient of head_weight is summed over chunks in fp32 and rounded once: in bf16, that (V,D) sum and
    a (chunk, V) block in bf16 come on top.
    """
    chunk = chunk or default_chunk(len(head_weight))
    return _ChunkedLogProbs.apply(hidden, head_weight, targets, temperature, chunk, entropy_grad)


class _ChunkedKL(torch.autograd.Function):
    """KL(p || q) of N tokens: p = softmax(l) is the policy's, q the reference model's, without gradient.

        KL = sum_v p_v (log p_v - log q_v)            d KL / d l_v = p_v (log p_v - log q_v - KL)

    The forward keeps the KL. As in _ChunkedLogProbs, all chunks write to the same two (chunk, V) blocks.
    """

    @staticmethod
    def _log_softmax(out, hidden, weight, temperature):
        _addmm_fp32(out, hidden, weight.T, beta=0, alpha=1 / temperature)
        return out.sub_(out.logsumexp(-1, keepdim=True))

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, temperature, chunk):
        """hidden (N,D) and weight (V,D) of both models -> KL (N,)."""
        kl = hidden.new_empty(len(hidden), dtype=torch.float32)                                         # (N,)
        blocks = hidden.new_empty(2, min(chunk, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            log_p, log_q = blocks[:, :rows.stop - start]                                   # (chunk, V) each
            _ChunkedKL._log_softmax(log_p, hidden[rows], weight, temperature)
            _ChunkedKL._log_softmax(log_q, ref_hidden[rows], ref_weight, temperature)
            log_ratio = log_q.neg_().add_(log_p)             # log p - log q, in the block of log q
            probs = log_p.exp_()                             # p, in the block of log p
            kl[rows] = probs.mul_(log_ratio).sum(-1)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, kl)
        ctx.temperature, ctx.chunk = temperature, chunk
        return kl

    @staticmethod
    def backward(ctx, grad_kl):
        """The gradient with respect to the KL, (N,) -> to the policy's hidden (N,D) and weight (V,D)."""
        hidden, weight, ref_hidden, ref_weight, kl = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)                                  # (V, D)
        blocks = hidden.new_empty(2, min(ctx.chunk, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, min(start + ctx.chunk, len(hidden)))
            log_p, log_q = blocks[:, :rows.stop - start]                                   # (chunk, V) each
            _ChunkedKL._log_softmax(log_p, hidden[rows], weight, ctx.temperature)
            _ChunkedKL._log_softmax(log_q, ref_hidden[rows], ref_weight, ctx.temperature)
            # dL / d l_v = p_v factor_v,   factor_v = (log p_v - log q_v - KL) dL / d KL / temperature.
            log_ratio = log_q.neg_().add_(log_p)
            factor = log_ratio.sub_(kl[rows, None]).mul_(grad_kl[rows, None] / ctx.temperature)
            grad_logits = log_p.exp_().mul_(factor).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            _addmm_fp32(grad_weight, grad_logits.T, hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def token_kl(hidden, head_weight, ref_hidden, ref_head_weight, temperature=1.0, chunk=None):
    """KL(pi || pi_ref) >= 0 of the full distributions at each position (Eq. A1), nats, fp32, with gradient
    for pi.

    hidden (N,D), head_weight (V,D), and the reference model's, which may have another D -> (N,). Memory
    beyond inputs and gradients peaks at three (chunk, V) fp32 blocks, logsumexp's among them.
    """
    chunk = chunk or default_chunk(len(head_weight))
    return _ChunkedKL.apply(hidden, head_weight, ref_hidden, ref_head_weight, temperature, chunk)
