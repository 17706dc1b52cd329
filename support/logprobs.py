"""Log-probabilities, entropy and KL without ever holding (N, V)."""
import torch


def _addmm_fp32(out, a, b, beta=1.0, alpha=1.0):
    """out = beta * out + alpha * a @ b, in place; out is fp32 whatever a and b are."""
    if not a.is_cuda or a.dtype == torch.float32:
        out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)
    elif beta:                                     # one kernel: neither a rounded product nor a copy of it
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
        if alpha != 1:
            out.mul_(alpha)


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward keeps only the log-normalizer and the entropy of each token; backward recomputes the logits
    chunk by chunk. All chunks write to the same (chunk, V) blocks: on a CPU, a fresh block costs more time in
    page faults than softmax takes on it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, entropy_grad):
        logp = hidden.new_empty(len(hidden), dtype=torch.float32)
        logz, entropy = torch.empty_like(logp), torch.empty_like(logp)
        blocks = hidden.new_empty(2, min(chunk, len(hidden)), len(weight), dtype=torch.float32)
        for s in range(0, len(hidden), chunk):
            c = slice(s, min(s + chunk, len(hidden)))
            logits, p = blocks[:, :c.stop - s]
            _addmm_fp32(logits, hidden[c], weight.T, beta=0, alpha=1 / temperature)
            torch.softmax(logits, -1, out=p)
            z = p.sum(-1)                                   # 1, but for the rounding of softmax's own sum
            logz[c] = logits.amax(-1) + (z / p.amax(-1)).log_()
            logp[c] = logits.gather(-1, targets[c, None])[:, 0] - logz[c]
            entropy[c] = logz[c] - p.mul_(logits).sum(-1) / z                       # H = log Z - E[logit]
        ctx.save_for_backward(hidden, weight, targets, logz, entropy)
        ctx.temperature, ctx.chunk, ctx.entropy_grad = temperature, chunk, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, logz, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        blocks = hidden.new_empty(1 + ctx.entropy_grad, min(ctx.chunk, len(hidden)), len(weight),
                                  dtype=torch.float32)
        for s in range(0, len(hidden), ctx.chunk):
            c = slice(s, min(s + ctx.chunk, len(hidden)))
            log_p, scale = blocks[0, :c.stop - s], blocks[-1, :c.stop - s]
            _addmm_fp32(log_p, hidden[c], weight.T, beta=0, alpha=1 / ctx.temperature)
            log_p.sub_(logz[c, None])
            # d logp_y / d logits = onehot(y) - p.      d H / d logits = -p (log p + H).
            g, e = grad_logp[c, None] / ctx.temperature, grad_entropy[c, None] / ctx.temperature
            if ctx.entropy_grad:
                torch.add(log_p, entropy[c, None], out=scale).mul_(-e).sub_(g)
            else:
                scale = -g
            d = log_p.exp_().mul_(scale).scatter_add_(-1, targets[c, None], g).to(hidden.dtype)
            grad_hidden[c] = d @ weight
            if grad_weight is not None:
                _addmm_fp32(grad_weight, d.T, hidden[c])
        return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype),
                None, None, None, None)


def token_logprobs(hidden, head_weight, targets, temperature=1.0, chunk=None, entropy_grad=False):
    """log softmax(hidden @ head_weight.T / temperature)[targets] and the entropy of that softmax.

    hidden (N,D), head_weight (V,D), targets (N,) int64 -> logp (N,) with gradient, entropy (N,); nats,
    fp32. The entropy has no gradient unless `entropy_grad` (an entropy bonus). Whatever N is, memory beyond
    inputs and gradients peaks at two (chunk, V) fp32 blocks; by default `chunk` is 1024 tokens, or fewer
    where the two would take more than 1 GiB. The gradient of head_weight is summed over chunks in fp32 and
    rounded once: in bf16, that (V,D) sum and a (chunk, V) block in bf16 come on top.
    """
    return _ChunkedLogProbs.apply(hidden, head_weight, targets, temperature,
                                  chunk or default_chunk(len(head_weight)), entropy_grad)


def default_chunk(vocabulary):
    """1024 tokens, or fewer where two (chunk, V) fp32 blocks would take more than 1 GiB: a multiple of 128,
    the height of a tile in the GPU's matrix products."""
    return min(1024, max(128, 2**27 // vocabulary // 128 * 128))


class _ChunkedKL(torch.autograd.Function):
    """As _ChunkedLogProbs: backward recomputes the logits of both models chunk by chunk, in two (chunk, V)
    blocks."""

    @staticmethod
    def _log_softmax(out, hidden, weight, temperature):
        _addmm_fp32(out, hidden, weight.T, beta=0, alpha=1 / temperature)
        return out.sub_(out.logsumexp(-1, keepdim=True))

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, temperature, chunk):
        kl = hidden.new_empty(len(hidden), dtype=torch.float32)
        blocks = hidden.new_empty(2, min(chunk, len(hidden)), len(weight), dtype=torch.float32)
        for s in range(0, len(hidden), chunk):
            c = slice(s, min(s + chunk, len(hidden)))
            log_p, log_q = blocks[:, :c.stop - s]
            _ChunkedKL._log_softmax(log_p, hidden[c], weight, temperature)
            _ChunkedKL._log_softmax(log_q, ref_hidden[c], ref_weight, temperature)
            log_q.neg_().add_(log_p)
            kl[c] = log_p.exp_().mul_(log_q).sum(-1)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, kl)
        ctx.temperature, ctx.chunk = temperature, chunk
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, ref_hidden, ref_weight, kl = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        blocks = hidden.new_empty(2, min(ctx.chunk, len(hidden)), len(weight), dtype=torch.float32)
        for s in range(0, len(hidden), ctx.chunk):
            c = slice(s, min(s + ctx.chunk, len(hidden)))
            log_p, log_q = blocks[:, :c.stop - s]
            _ChunkedKL._log_softmax(log_p, hidden[c], weight, ctx.temperature)
            _ChunkedKL._log_softmax(log_q, ref_hidden[c], ref_weight, ctx.temperature)
            # d KL / d logits = p (log p - log q - KL).
            log_q.neg_().add_(log_p).sub_(kl[c, None]).mul_(grad[c, None] / ctx.temperature)
            d = log_p.exp_().mul_(log_q).to(hidden.dtype)
            grad_hidden[c] = d @ weight
            _addmm_fp32(grad_weight, d.T, hidden[c])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def token_kl(hidden, head_weight, ref_hidden, ref_head_weight, temperature=1.0, chunk=None):
    """KL(pi || pi_ref) >= 0 of the full distributions at each position (Eq. A1), nats, fp32, with gradient
    for pi.

    hidden (N,D), head_weight (V,D), and the reference model's, which may have another D -> (N,). Memory
    beyond inputs and gradients peaks at three (chunk, V) fp32 blocks, logsumexp's among them.
    """
    return _ChunkedKL.apply(hidden, head_weight, ref_hidden, ref_head_weight, temperature,
                            chunk or default_chunk(len(head_weight)))


