/* A DMA section of a lane (vfio_model/memory/lane.py), for the compiled halves of DMA paths.
 *
 * Between begin_section() and end_section() there is nothing but loads, tests and one copy of at most SECTION_BYTES; no
 * call into Python, which could also give the interpreter lock away. Shared words are loaded once and whole. Whoever
 * revokes runs a barrier on this processor (membarrier), so that no fence is needed here but the compiler's own.
 */
#ifndef VFIO_MODEL_LANE_H
#define VFIO_MODEL_LANE_H

#include <stdint.h>

#define SECTION_BYTES (256 * 1024)

static inline uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* The counter, which was `count`, goes odd. */
static inline void begin_section(uint64_t *counter, uint64_t count)
{
    __atomic_store_n(counter, count + 1, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* And even. */
static inline void end_section(uint64_t *counter, uint64_t count)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n(counter, count + 2, __ATOMIC_RELEASE);
}

#endif
