// Calls one kernel of a library: emulated_call LIBRARY FUNCTION REQUEST RESPONSE
//
// The request is a sequence of 64-bit integers and bytes: the number of members of the kernel's argument; for each
// member -1 and its bits, or the number of a buffer and an offset into it; the number of buffers; for each its
// size and its bytes. The response is the status that the kernel returned, and the bytes of all buffers.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <vector>

int main(int, char** argv) {
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    auto kernel = reinterpret_cast<int64_t (*)(const void*)>(dlsym(library, argv[2]));
    if (!kernel) return std::fprintf(stderr, "%s\n", dlerror()), 1;

    std::ifstream request(argv[3], std::ios::binary);
    auto next = [&] {
        int64_t x = 0;
        request.read(reinterpret_cast<char*>(&x), sizeof x);
        return x;
    };
    struct Member {
        int64_t buffer, value;
    };
    std::vector<Member> members(next());
    for (Member& m : members) {
        m.buffer = next();
        m.value = next();
    }
    std::vector<std::vector<char>> buffers(next());
    for (auto& buffer : buffers) {
        buffer.resize(next());
        request.read(buffer.data(), buffer.size());
    }
    std::vector<int64_t> argument;
    for (const Member& m : members)
        argument.push_back(m.buffer < 0 ? m.value : reinterpret_cast<int64_t>(buffers[m.buffer].data()) + m.value);

    int64_t status = kernel(argument.data());
    std::ofstream response(argv[4], std::ios::binary);
    response.write(reinterpret_cast<const char*>(&status), sizeof status);
    for (const auto& buffer : buffers) response.write(buffer.data(), buffer.size());
    return response.good() && request.good() ? 0 : 1;
}
