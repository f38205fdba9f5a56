// URL FILE COUNT: posts the file so many times, as .NET's documentation has it.
using System;
using System.IO;
using System.Net;

class Ask {
    static void Main(string[] words) {
        for (int n = 0; n < int.Parse(words[2]); n++) {
            using (var client = new WebClient()) {
                client.Headers["content-type"] = "application/json";
                client.UploadString(words[0], File.ReadAllText(words[1]));
            }
        }
    }
}
