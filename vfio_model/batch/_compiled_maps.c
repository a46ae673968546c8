/* The compiled variant of mapping many pages at once: a guest's list of TCEs, the structures made of it, and the host's
 * TCEs made of those, or of a run of pages.
 *
 * A structure is include/uapi/linux/vfio.h's vfio_iommu_type1_dma_map of 32 bytes: argsz and flags (here one word, the
 * head), vaddr, iova, size. vfio_model/batch/tces.py and dma_map.py do the same with numpy; results equal it.
 *
 * What must not be broken: devices walk the table while it is written, so an entry is stored once, as a whole word.
 * Addresses are u64 and wrap. Nothing is stored before every argument has been looked at.
 */
#include "_compiled.h"

#define PERM_MASK 3u
#define MAP_SIZE 32u
#define MAP_WORDS 4u
enum { HEAD, VADDR, IOVA, SIZE };

static int take_many_u64(PyObject *const *args, uint64_t *values, int count)
{
    for (int i = 0; i < count; i++)
        if (take_u64(args[i], values + i))
            return -1;
    return 0;
}

/* A page shift of an IOMMU table. */
static int take_shift(PyObject *object, uint64_t *shift)
{
    if (take_u64(object, shift))
        return -1;
    return *shift < 2 || *shift > 63 ? refuse("page_shift", "it lies in 2..63") : 0;
}

static PyObject *split_tces(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer tces, pages;
    uint64_t shift;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 3)
        return PyErr_Format(PyExc_TypeError, "split_tces takes tces, page_shift, pages");
    if (take_shift(args[1], &shift) || take_words(args[0], &tces, 0, "tces"))
        return NULL;
    if (take_words(args[2], &pages, PyBUF_WRITABLE, "pages"))
        goto no_pages;
    if (pages.len != tces.len) {
        refuse("pages", "as many words as tces are needed");
    } else {
        uint64_t some = 0, every = UINT64_MAX, mask = ~((UINT64_C(1) << shift) - 1);
        size_t count = (size_t)tces.len / 8;
        for (size_t i = 0; i < count; i++) {
            uint64_t tce = word(tces.buf, i);
            some |= tce;
            every &= tce;
            put(pages.buf, i, tce & mask);
        }
        result = Py_BuildValue("ii", (int)(some & PERM_MASK), (int)(every & PERM_MASK));
    }
    PyBuffer_Release(&pages);
no_pages:
    PyBuffer_Release(&tces);
    return result;
}

static PyObject *page_bounds(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer pages;
    uint64_t low = UINT64_MAX, high = 0;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 1)
        return PyErr_Format(PyExc_TypeError, "page_bounds takes pages");
    if (take_words(args[0], &pages, 0, "pages"))
        return NULL;
    for (size_t i = 0; i < (size_t)pages.len / 8; i++) {
        uint64_t page = word(pages.buf, i);
        low = page < low ? page : low;
        high = page > high ? page : high;
    }
    if (pages.len)
        result = Py_BuildValue("KK", (unsigned long long)low, (unsigned long long)high);
    else
        refuse("pages", "at least one is needed");
    PyBuffer_Release(&pages);
    return result;
}

static PyObject *consecutive(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer pages;
    uint64_t step, odd = 0;

    (void)module;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "consecutive takes pages, step");
    if (take_u64(args[1], &step) || take_words(args[0], &pages, 0, "pages"))
        return NULL;
    for (size_t i = 1; i < (size_t)pages.len / 8; i++)
        odd |= word(pages.buf, i) ^ (word(pages.buf, i - 1) + step);
    PyBuffer_Release(&pages);
    return PyBool_FromLong(!odd);
}

static PyObject *pack_dma_maps(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer pages;
    uint64_t numbers[3], shift;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 5)
        return PyErr_Format(PyExc_TypeError, "pack_dma_maps takes pages, to_vaddr, first_iova, page_shift, head");
    if (take_many_u64(args + 1, numbers, 2) || take_shift(args[3], &shift) || take_u64(args[4], numbers + 2) ||
        take_words(args[0], &pages, 0, "pages"))
        return NULL;
    if (pages.len > PY_SSIZE_T_MAX / (Py_ssize_t)MAP_WORDS) {
        PyErr_NoMemory();
    } else if ((result = PyBytes_FromStringAndSize(NULL, pages.len * (Py_ssize_t)MAP_WORDS))) {
        char *maps = PyBytes_AsString(result);
        size_t count = (size_t)pages.len / 8;
        for (size_t i = 0; i < count; i++) {
            const uint64_t map[MAP_WORDS] = {
                [HEAD] = numbers[2], [VADDR] = word(pages.buf, i) + numbers[0],
                [IOVA] = numbers[1] + ((uint64_t)i << shift), [SIZE] = UINT64_C(1) << shift,
            };
            memcpy(maps + i * MAP_SIZE, map, MAP_SIZE);
        }
    }
    PyBuffer_Release(&pages);
    return result;
}

/* Refuses what leaves `room` structures or entries. */
static int check_part(const char *name, uint64_t first, uint64_t count, uint64_t room)
{
    return first > room || count > room - first ? refuse(name, "the buffer does not hold so many") : 0;
}

static PyObject *look_at_dma_maps(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer maps;
    uint64_t count;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "look_at_dma_maps takes maps, count");
    if (take_u64(args[1], &count) || take(args[0], &maps, PyBUF_SIMPLE, "maps"))
        return NULL;
    if (check_part("count", 0, count, (uint64_t)maps.len / MAP_SIZE) == 0) {
        const char *map = maps.buf;
        uint64_t low = UINT64_MAX, high = 0, bits = 0, odd = !count;
        uint64_t head = 0, iova = 0, size = 0, next;
        if (count) {
            head = word(map, HEAD);
            next = iova = word(map, IOVA);
            size = word(map, SIZE);
        }
        for (uint64_t i = 0; i < count; i++, map += MAP_SIZE, next += size) {
            uint64_t vaddr = word(map, VADDR);
            odd |= (word(map, HEAD) ^ head) | (word(map, IOVA) ^ next) | (word(map, SIZE) ^ size);
            bits |= vaddr;
            low = vaddr < low ? vaddr : low;
            high = vaddr > high ? vaddr : high;
        }
        if (odd)
            result = Py_BuildValue("");
        else
            result = Py_BuildValue("KKKKKK", (unsigned long long)head, (unsigned long long)iova,
                                   (unsigned long long)size, (unsigned long long)low, (unsigned long long)high,
                                   (unsigned long long)bits);
    }
    PyBuffer_Release(&maps);
    return result;
}

/* Where a segment's bytes lie; vfio_model/host/hpa.py. */
typedef struct {
    uint64_t base, shift, bits, multiplier, addend;
} Hpa;

static inline uint64_t to_hpa(const Hpa *hpa, uint64_t offset)
{
    uint64_t page = ((offset >> hpa->shift) * hpa->multiplier + hpa->addend) & ((UINT64_C(1) << hpa->bits) - 1);

    return hpa->base + (page << hpa->shift) + (offset & ((UINT64_C(1) << hpa->shift) - 1));
}

/* Arguments base, shift, bits, multiplier, addend. */
static int take_hpa(PyObject *const *args, Hpa *hpa)
{
    uint64_t place[5];

    if (take_many_u64(args, place, 5))
        return -1;
    if (place[1] > 63 || place[2] > 63)
        return refuse("shift and bits", "they lie in 0..63");
    *hpa = (Hpa){place[0], place[1], place[2], place[3], place[4]};
    return 0;
}

static PyObject *maps_to_tces(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer maps, words;
    uint64_t part[4];
    Hpa hpa;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 11)
        return PyErr_Format(PyExc_TypeError, "maps_to_tces takes maps, first, count, to_offset, perm, "
                                             "base, shift, bits, multiplier, addend, tces");
    if (take_many_u64(args + 1, part, 4) || take_hpa(args + 5, &hpa))
        return NULL;
    if (take(args[0], &maps, PyBUF_SIMPLE, "maps"))
        return NULL;
    if (take_words(args[10], &words, PyBUF_WRITABLE, "tces"))
        goto no_words;
    if ((uintptr_t)words.buf & 7) {
        refuse("tces", "its words are not aligned");
    } else if (check_part("maps", part[0], part[1], (uint64_t)maps.len / MAP_SIZE) == 0 &&
               check_part("tces", 0, part[1], (uint64_t)words.len / 8) == 0) {
        const char *map = (const char *)maps.buf + part[0] * MAP_SIZE;
        uint64_t *tces = words.buf;
        for (uint64_t i = 0; i < part[1]; i++, map += MAP_SIZE)
            __atomic_store_n(tces + i, to_hpa(&hpa, word(map, VADDR) + part[2]) | part[3], __ATOMIC_RELAXED);
        result = Py_BuildValue("");
    }
    PyBuffer_Release(&words);
no_words:
    PyBuffer_Release(&maps);
    return result;
}

/* Entries of `count` pages that follow one another in a segment, into the aligned words of a table. */
static void store_pages(uint64_t *entry, uint64_t count, uint64_t offset, uint64_t step, uint64_t perm, const Hpa *hpa)
{
    const Hpa place = *hpa;

    if (place.multiplier == 1 && place.addend == 0) { /* the segment lies in one piece */
        uint64_t tce = (place.base + offset) | perm;
        for (uint64_t i = 0; i < count; i++, tce += step)
            __atomic_store_n(entry + i, tce, __ATOMIC_RELAXED);
        return;
    }
    for (uint64_t i = 0; i < count; i++, offset += step)
        __atomic_store_n(entry + i, to_hpa(&place, offset) | perm, __ATOMIC_RELAXED);
}

static PyObject *store_run(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer words;
    uint64_t part[3], shift, perm;
    Hpa hpa;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 11)
        return PyErr_Format(PyExc_TypeError, "store_run takes words, first, count, offset, page_shift, perm, "
                                             "base, shift, bits, multiplier, addend");
    if (take_many_u64(args + 1, part, 3) || take_shift(args[4], &shift) || take_u64(args[5], &perm) ||
        take_hpa(args + 6, &hpa) || take_words(args[0], &words, PyBUF_WRITABLE, "words"))
        return NULL;
    if ((uintptr_t)words.buf & 7) {
        refuse("words", "they are not aligned");
    } else if (check_part("words", part[0], part[1], (uint64_t)words.len / 8) == 0) {
        store_pages((uint64_t *)words.buf + part[0], part[1], part[2], UINT64_C(1) << shift, perm, &hpa);
        result = Py_BuildValue("");
    }
    PyBuffer_Release(&words);
    return result;
}

static PyObject *claim(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer owners;
    uint64_t part[3];
    PyObject *result = NULL;

    (void)module;
    if (nargs != 4)
        return PyErr_Format(PyExc_TypeError, "claim takes owners, first, count, owner");
    if (take_many_u64(args + 1, part, 3) || take(args[0], &owners, PyBUF_WRITABLE, "owners"))
        return NULL;
    if ((uintptr_t)owners.buf & 3 || part[2] > UINT32_MAX) {
        refuse("owners", "aligned numbers of 4 bytes are needed");
    } else if (check_part("owners", part[0], part[1], (uint64_t)owners.len / 4) == 0) {
        uint32_t *owner = (uint32_t *)owners.buf + part[0], before = part[1] ? *owner : 0, odd = 0;
        for (uint64_t i = 0; i < part[1]; i++)
            odd |= owner[i] ^ before;
        for (uint64_t i = 0; i < part[1] && !odd; i++)
            owner[i] = (uint32_t)part[2];
        result = odd ? Py_BuildValue("") : PyLong_FromUnsignedLongLong(before);
    }
    PyBuffer_Release(&owners);
    return result;
}

PyMethodDef map_functions[] = {
    FUNCTION(split_tces),       FUNCTION(page_bounds),  FUNCTION(consecutive), FUNCTION(pack_dma_maps),
    FUNCTION(look_at_dma_maps), FUNCTION(maps_to_tces), FUNCTION(store_run),   FUNCTION(claim),
    {NULL, NULL, 0, NULL},
};
