"""The building blocks of every loss: steps, distributions, signals, parts, and the chunked pass. It knows no method.

The words (step, signal, signal rows, part, statistic, pack, clock) are in the glossary of docs/concepts.md.

Axis letters, used at the end of every tensor's name:
    N  decision steps (generated tokens, or those of a given response), packed end to end without padding
    R  rollouts in a pack
    V  vocabulary
    K  kept candidates of a distribution
    D  width of a hidden state, or elements of a latent
    C  one chunk of N
    L  all tokens of one rollout: prompt, actions and tool replies, interleaved
    A  the decision steps of one rollout (those of its L tokens that the policy generated)

Log-probabilities and entropies are in nats. Tensors end in their axes (`student_logp_N`).
"""
